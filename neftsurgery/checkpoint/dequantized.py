"""A checkpoint read as the numbers that its weights stand for.

Codes and their scales are seen as one weight, under the name that models give it. Its numbers are computed
when they are read; so a quantized checkpoint is compared like any other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MismatchError
from ..neurons.layout import Layout
from ..neurons.vectors import gather
from ..quantization.layouts import quantized_weights
from ..quantization.settings import Settings, quantization_section
from ..quantization.weight import CodedWeight, Companion, QuantizedWeight, rows_read
from ..tensors.arrays import Int64Array, RawBytes
from ..tensors.floats import FLOATS, widen
from ..tensors.header import TensorInfo
from .checkpoint import Checkpoint, ComputedWeights

_KEPT_MATRICES = 4  # codes of transposed matrices, read piece by piece along the other axis


@dataclass(frozen=True, repr=False, kw_only=True)
class Dequantized(ComputedWeights):
    """A checkpoint whose quantized weights are shown as numbers. Made by `dequantized`."""

    shown: Mapping[str, QuantizedWeight | None]  # None: only widened
    straight: frozenset[str] = frozenset()  # those of `shown` whose last two axes are as in their codes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor data in the files."""
        return self.files.nbytes

    def stored_bytes(self, name: str) -> int:
        """As of `Checkpoint`: those of codes and scales."""
        weight = self.quantized.get(name := self._source(name))
        return self.files.tensors[name].nbytes if weight is None else weight.nbytes

    def position(self, name: str) -> tuple[int, int]:
        """As of `Checkpoint`: that of the codes."""
        weight = self.quantized.get(name := self._source(name))
        return self.files.position(name if weight is None else weight.codes.name)

    def under(self, names: Mapping[str, str]) -> Dequantized:
        """As of `Checkpoint`."""
        plain = {name: one for name, one in names.items() if one not in self.quantized}
        found = super().under(names)
        assert isinstance(found, Dequantized)  # it is a copy of this
        return replace(found, files=self.files.under(plain)) if plain else found

    def _source(self, name: str) -> str:
        return self.tensors[name].name

    def fill(self, name: str, rows: Int64Array, out: RawBytes) -> None:
        """As of `ComputedWeights`; rows along the last axis."""
        self._fill(name, rows, out.view(self.tensors[name].type.numpy))

    def _fill(self, name: str, rows: Int64Array, out: NDArray[np.floating]) -> None:
        weight, (*_, height, width) = self.shown[name], self.tensors[name].shape
        if weight is None:
            stored = self.files.tensors[name]
            out[:] = widen(rows_read(self.files, Companion.of(stored, stored.shape, 1), rows), stored.dtype)
        elif not weight.transposed or name in self.straight:
            weight.numbers(self.files, rows, out)
        else:
            matrix = rows // height
            for one in np.unique(matrix).tolist():
                low, high = np.searchsorted(matrix, [one, one + 1]).tolist()
                columns = rows[low:high] % height
                first, every = int(columns[0]), one * width + np.arange(width)
                numbers = np.empty((width, int(columns[-1]) + 1 - first), out.dtype)
                weight.numbers(self.files, every, numbers, first, self._matrix(name, one))
                dense = len(columns) == numbers.shape[1]
                out[low:high] = numbers.T if dense else numbers.T[columns - first]

    @functools.cached_property
    def _matrix(self) -> Callable[[str, int], RawBytes]:
        """Gives the codes of one matrix of a weight; they are read once for several pieces of it."""

        @functools.lru_cache(maxsize=_KEPT_MATRICES)
        def read(name: str, number: int) -> RawBytes:
            weight = self.quantized[name]
            rows = number * weight.shape[-2] + np.arange(weight.shape[-2])
            return rows_read(self.files, weight.companions["codes"], rows)

        lock = threading.Lock()  # a thread that needs a matrix too waits for the one that reads it

        def matrix(name: str, number: int) -> RawBytes:
            with lock:
                return read(name, number)

        return matrix


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantized weights as numbers; itself, if none is of a known layout.

    Raises a `CorruptFileError` for codes without scales, and a `MismatchError` for those that do not fit.
    """
    weights = dict[str, QuantizedWeight]()
    config, parts = checkpoint.config or {}, [part for part in checkpoint.parts if part]
    for part in (*parts, ""):
        own = config.get(part) if part else {key: one for key, one in config.items() if key not in parts}
        if section := quantization_section(own):
            mine = (name for name in checkpoint.tensors if name.startswith(part))
            names = [name for name in mine if part or not name.startswith(tuple(parts))]
            tensors = {name: checkpoint.tensors[name] for name in names}
            settings = Settings(checkpoint.name, section, tensors, checkpoint.absent, checkpoint.read_into)
            weights |= quantized_weights(settings)
    return _view(checkpoint, weights) if weights else checkpoint


def _view(checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> Dequantized:
    stored = {one.info.name for weight in weights.values() for one in weight.companions.values()}
    codes = {weight.codes.name: weight for weight in weights.values()}
    tensors, home = dict[str, TensorInfo](), dict[str, int]()
    for name, info in checkpoint.tensors.items():
        if name in codes:
            info = codes[name].info
        elif name in stored:
            continue
        tensors[info.name if name in codes else name] = info
        home[info.name if name in codes else name] = checkpoint._home[name]
    own: dict[str, Any] = {one.name: getattr(checkpoint, one.name) for one in fields(Checkpoint)}
    own |= {"tensors": tensors, "_home": home, "original": checkpoint.original or checkpoint}
    own["quantized"] = weights
    return Dequantized(**own, files=checkpoint, shown=weights)


def refuse_nonfinite(checkpoint: Checkpoint, info: TensorInfo, layout: Layout, neuron: int) -> None:
    """Raise a `CorruptFileError` if this neuron has a NaN or infinite number, and is stored as codes."""
    if (weight := checkpoint.quantized.get(info.name)) is None:
        return
    raw = gather(checkpoint, checkpoint.tensors[info.name], layout, np.array([neuron]))
    if not np.isfinite(raw.view(checkpoint.tensors[info.name].type.numpy)).all():
        raise CorruptFileError(
            f"a code, or its scale in {weight.scales.info.name}, stands for NaN or infinity",
            file=checkpoint.name,
            tensor=weight.codes.name,
            found=f"in neuron {neuron}",
            hint=f"fetch or save the checkpoint again, or leave the weight out: [[exclude={info.name}]]",
        )


def comparable(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether a tensor of both is compared by its numbers, which one stores as codes."""
    quantized = [name in side.quantized for side in (base, tuned)]
    a, b = base.tensors[name], tuned.tensors[name]
    return any(quantized) and a.shape == b.shape and {a.dtype, b.dtype} <= FLOATS


def in_common_numbers(
    base: Checkpoint, tuned: Checkpoint, names: Iterable[str]
) -> tuple[Checkpoint, Checkpoint, frozenset[str]]:
    """Both, with the weights of ``names`` that one stores as codes as numbers of one dtype.

    And those whose last two axes are in the order of the codes on both sides: it is faster to read.
    """
    infos, straight = dict[str, TensorInfo](), set[str]()
    for name in names:
        stored = [side.quantized.get(name) for side in (base, tuned)]
        if not any(stored):
            continue
        dtypes = {side.tensors[name].dtype for side in (base, tuned)}
        info = replace(base.tensors[name], dtype="F64" if "F64" in dtypes else "F32")
        if all(one is not None and one.transposed for one in stored):
            straight.add(name)
            *outer, rows, columns = info.shape
            info = replace(info, shape=(*outer, columns, rows))
        infos[name] = info
    if not infos:
        return base, tuned, frozenset()
    order, widened = frozenset(straight), dict.fromkeys(infos)  # those without codes are only widened
    first, second = (
        replace(view, tensors={**view.tensors, **infos}, shown={**widened, **view.shown}, straight=order)
        for view in (side if isinstance(side, Dequantized) else _view(side, {}) for side in (base, tuned))
    )
    return first, second, order


def coded_sides(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[CodedWeight, CodedWeight] | None:
    """Both sides of a weight whose sums follow from codes and scales; None unless both store it alike."""
    first, second = (side.quantized.get(name) for side in (base, tuned))
    if first is None or second is None or not first.summed_as(second):
        return None
    sides = (base, first), (tuned, second)
    files = [stored_side(side).under({name: weight.codes.name}) for side, weight in sides]
    return CodedWeight(files[0], first), CodedWeight(files[1], second)


def stored_side(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors that its files have."""
    return checkpoint.files if isinstance(checkpoint, Dequantized) else checkpoint


def require_stored_alike(base: Checkpoint, tuned: Checkpoint, names: Iterable[str]) -> None:
    """Raise a `MismatchError` unless both store weights in the same way, as numbers or as the same codes."""
    for name in names:
        a, b = (side.quantized.get(name) for side in (base, tuned))
        if (None if a is None else a.companions) != (None if b is None else b.companions):
            expected, found = (
                side.tensors[name].describe() if one is None else f"{one.layout} {one.codes.describe()}"
                for side, one in ((base, a), (tuned, b))
            )
            raise MismatchError(
                f"{base.name} and {tuned.name} store this weight in two ways",
                tensor=name,
                expected=expected,
                found=found,
                hint="name two checkpoints that were quantized alike, or both before quantization",
            )
