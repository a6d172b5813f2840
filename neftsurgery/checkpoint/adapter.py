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
from ..sources.resolve import Source, resolve
from ..storage.executors import Seen
from ..tensors.arrays import Float32Array, IndexArray, RawBytes
from ..tensors.floats import FLOATS, narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .adapter_config import CONFIG_NAME, WEIGHTS_NAME, Factor, read_factors
from .checkpoint import Checkpoint

_CACHED_FACTORS = 8


def open_pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    """Open a base and a tuned checkpoint, or a LoRA adapter of the base; raises as `read_factors`."""
    first, source = Checkpoint.open(base), resolve(tuned)
    is_adapter = (source.path / CONFIG_NAME).is_file()
    return first, AdaptedWeights.on(first, source) if is_adapter else Checkpoint.open(source)


@dataclass(frozen=True, repr=False, kw_only=True)
class AdaptedWeights(Checkpoint):
    """A base whose tensors, in its dtypes or some in F32, have an adapter merged into them; see `on`."""

    base: Checkpoint
    file: TensorFile  # the adapter's factors
    factors: Mapping[str, Factor | None]  # of the tensors that are computed; None: only converted

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
        return cls(source, *parts, base=base, file=file, factors={**factors})

    def in_float32(self) -> tuple[AdaptedWeights, AdaptedWeights]:
        """The base and this, with the adapted tensors in F32: what is added is seen before it is rounded."""
        short = {
            name: TensorInfo(name, "F32", info.shape)
            for name, info in self.tensors.items()
            if name in self.factors and info.dtype in FLOATS and info.type.itemsize < 4
        }
        shown = replace(self, tensors={**self.tensors, **short})
        return replace(shown, factors=dict.fromkeys(short)), shown

    @property
    def seen(self) -> Seen:
        """As of `Checkpoint`: the files of the base, and the adapter's."""
        return (*self.base.seen, self.file.seen)

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a file of the base or the adapter was edited or replaced."""
        self.base.check_unchanged()
        self.file.check_in_place()
        self.file.check_unchanged()

    def address(self, name: str) -> int:
        """As of `Checkpoint`."""
        return -1 if name in self.factors else self.base.address(name)

    def window(self, name: str, start: int, size: int) -> RawBytes | None:
        """As of `Checkpoint`; computed tensors are not in memory."""
        return None if name in self.factors else self.base.window(name, start, size)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As of `Checkpoint`; merged elements are rounded to the tensor's dtype."""
        if name not in self.factors:
            self.base.read_into(name, start, buffer)
            return
        info, stored = self.tensors[name], self.base.tensors[name]
        columns = info.elements // info.shape[0]
        row, size = columns * info.type.itemsize, columns * stored.type.itemsize
        low, high = start // row, -(-(start + len(buffer)) // row)
        raw = np.empty((high - low, size), np.uint8)
        self.base.read_into(name, low * size, raw.data.cast("B"))
        skipped = start - low * row
        buffer[:] = self._merged(name, slice(low, high), raw).reshape(-1)[skipped:][: len(buffer)].data

    def read_rows(self, name: str, rows: IndexArray, out: RawBytes) -> None:
        """As of `Checkpoint`; merged elements are rounded to the tensor's dtype."""
        if name not in self.factors:
            self.base.read_rows(name, rows, out)
            return
        info, stored = self.tensors[name], self.base.tensors[name]
        columns = info.elements // info.shape[0]
        if out.shape[1] != columns * info.type.itemsize:  # rows of the caller, not of the matrix
            for row, place in zip(rows.tolist(), out, strict=True):
                self.read_into(name, row * out.shape[1], place.data)
            return
        raw = np.empty((len(rows), columns * stored.type.itemsize), np.uint8)
        self.base.read_rows(name, rows, raw)
        out[:] = self._merged(name, rows, raw)

    def _merged(self, name: str, rows: slice | IndexArray, raw: RawBytes) -> RawBytes:
        """Whole rows of the base as raw bytes, with what the adapter adds to them."""
        stored, shown = self.base.tensors[name].dtype, self.tensors[name].dtype
        merged: NDArray[Any] = widen(raw, stored)
        if stored != "F64":
            merged = merged.astype(np.float32)
        if self.factors[name] is not None:
            left, right, scale = self._loaded(name)
            with np.errstate(all="ignore"):  # what overflows is counted where it is scored
                merged += (left[rows] @ right) * scale
        return merged.view(np.uint8) if shown == "F32" else narrow(merged, shown)

    @functools.cached_property
    def _loaded(self) -> Callable[[str], tuple[Float32Array, Float32Array, np.float32]]:
        """Gives a stored tensor's factors, ``[rows, r]`` and ``[r, columns]``, and the scale."""

        @functools.lru_cache(maxsize=_CACHED_FACTORS)
        def load(name: str) -> tuple[Float32Array, Float32Array, np.float32]:
            factor = self.factors[name]
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
