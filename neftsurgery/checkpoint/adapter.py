"""A base with a PEFT LoRA adapter on it, merged when it is read: in float32, as PEFT merges."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError
from ..quantization.weight import Companion, rows_read
from ..sources.resolve import Source, resolve
from ..tensors.arrays import Float32Array, Int64Array, RawBytes
from ..tensors.floats import FLOATS, narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .adapter_config import CONFIG_NAME, WEIGHTS_NAME, Factor, read_factors
from .checkpoint import Checkpoint, ComputedWeights

_CACHED_FACTORS = 8


def open_pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    """Open a base and a tuned checkpoint, or a LoRA adapter of the base; raises as `read_factors`."""
    first, source = Checkpoint.open(base), resolve(tuned)
    is_adapter = (source.path / CONFIG_NAME).is_file()
    return first, AdaptedWeights.on(first, source) if is_adapter else Checkpoint.open(source)


@dataclass(frozen=True, repr=False, kw_only=True)
class AdaptedWeights(ComputedWeights):
    """A base whose tensors, in its dtypes or some in F32, have an adapter merged into them; see `on`."""

    file: TensorFile  # the adapter's factors
    shown: Mapping[str, Factor | None]  # None: only converted

    @classmethod
    def on(cls, base: Checkpoint, source: Source) -> AdaptedWeights:
        """The adapter in a folder, which may be that of a Hub repository, on an open base."""
        path = source.path
        if not (path / WEIGHTS_NAME).is_file():
            raise CorruptFileError(
                f"the adapter folder has no {WEIGHTS_NAME}",
                file=source.named,
                hint="adapters saved as .bin are not read: save it again with safetensors",
            )
        file = TensorFile.named(path / WEIGHTS_NAME)
        factors = read_factors(path / CONFIG_NAME, file, base)
        parts = (base.root, base.is_file, base.shards, base.tensors, base._home)
        return cls(source, *parts, files=base, file=file, shown={**factors})

    def in_float32(self) -> tuple[AdaptedWeights, AdaptedWeights]:
        """The base and this, with the adapted tensors in F32: what is added is seen before it is rounded."""
        short = {
            name: TensorInfo(name, "F32", info.shape)
            for name, info in self.tensors.items()
            if name in self.shown and info.dtype in FLOATS and info.type.itemsize < 4
        }
        shown = replace(self, tensors={**self.tensors, **short})
        return replace(shown, shown=dict.fromkeys(short)), shown

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a file of the base or the adapter was edited or replaced."""
        self.files.check_unchanged()
        self.file.check_in_place()
        self.file.check_unchanged()

    def row_elements(self, info: TensorInfo) -> int:
        """Of the matrix that the factors make, also of a convolution."""
        return info.elements // info.shape[0]

    def fill(self, name: str, rows: Int64Array, out: RawBytes) -> None:
        """As of `ComputedWeights`; merged elements are rounded to the tensor's dtype."""
        stored, shown = self.files.tensors[name], self.tensors[name].dtype
        merged: NDArray[Any] = widen(rows_read(self.files, Companion(stored, 1, (0,)), rows), stored.dtype)
        if stored.dtype != "F64":
            merged = merged.astype(np.float32)
        if self.shown[name] is not None:
            left, right, scale = self._loaded(name)
            with np.errstate(all="ignore"):  # what overflows is counted where it is scored
                merged += (left[rows] @ right) * scale
        out[:] = merged.view(np.uint8) if shown == "F32" else narrow(merged, shown)

    @functools.cached_property
    def _loaded(self) -> Callable[[str], tuple[Float32Array, Float32Array, np.float32]]:
        """Gives a stored tensor's factors, ``[rows, r]`` and ``[r, columns]``, and the scale."""

        @functools.lru_cache(maxsize=_CACHED_FACTORS)
        def load(name: str) -> tuple[Float32Array, Float32Array, np.float32]:
            factor = self.shown[name]
            assert factor is not None  # checked by the caller
            with np.errstate(all="ignore"):
                a, b = (
                    widen(self.file.array_bytes(entry), self.file.tensors[entry].dtype).astype(np.float32)
                    for entry in (factor.a, factor.b)
                )
            pair = (a.T, b.T) if factor.transposed else (b, a)
            left, right = (np.ascontiguousarray(one).reshape(len(one), -1) for one in pair)
            return left, right, np.float32(factor.scale)

        return load
