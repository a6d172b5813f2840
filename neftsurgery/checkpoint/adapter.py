"""A base with a PEFT LoRA adapter on it, read as a checkpoint that nobody has written.

Every byte that is asked for is computed on the spot: the base's elements plus those of ``(alpha / r) B
@ A``, in float32, as PEFT merges. So an adapter is diffed and extracted from like any tuned checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError
from ..sources.resolve import Source
from ..tensors.floats import FLOATS, narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .adapter_config import CONFIG_NAME, WEIGHTS_NAME, Factor, read_factors
from .checkpoint import Checkpoint
from .opening import open_checkpoint

__all__ = ["Adapted", "InFloat32", "is_adapter", "open_pair"]

F32 = NDArray[np.float32]
_KEPT = 8  # factors in memory


def is_adapter(named: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return (Path(named) / CONFIG_NAME).is_file()


def open_pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    """Open a base and a tuned checkpoint; the tuned one may be a LoRA adapter of the base.

    Raises
    ------
    MismatchError
        If an adapter is not for this base, or is of a kind that cannot be read.
    UsageError, CorruptFileError, MachineError
        As `open_checkpoint`.
    """
    first = open_checkpoint(base)
    return first, Adapted.over(first, tuned) if is_adapter(tuned) else open_checkpoint(tuned)


@dataclass(frozen=True, kw_only=True)
class Adapted(Checkpoint):
    """A base with an adapter merged into it, in the base's own dtypes. Made by `over`.

    Attributes
    ----------
    factors:
        By tensor, what the adapter adds to it.
    adapter:
        The open file of the factors.
    """

    factors: Mapping[str, Factor]
    adapter: TensorFile

    @classmethod
    def over(cls, base: Checkpoint, folder: str | os.PathLike[str]) -> Adapted:
        """The adapter in ``folder`` over an open base."""
        path = Path(folder)
        if not (path / WEIGHTS_NAME).is_file():
            raise CorruptFileError(
                f"the adapter folder has no {WEIGHTS_NAME}",
                file=folder,
                hint="adapters saved as .bin are not read: save it again with safetensors",
            )
        file = TensorFile.named(path / WEIGHTS_NAME)
        return cls(
            Source(path, os.fspath(folder)),
            base.root,
            base.is_file,
            base.shards,
            base.tensors,
            base._home,
            factors=read_factors(path / CONFIG_NAME, file, base),
            adapter=file,
        )

    def window(self, name: str, start: int, size: int) -> NDArray[np.uint8] | None:
        """As of `Checkpoint`; what must be computed lies nowhere."""
        return None if name in self.factors else super().window(name, start, size)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As of `Checkpoint`; merged elements are rounded to the tensor's dtype."""
        if name not in self.factors:
            super().read_into(name, start, buffer)
            return
        info = self.tensors[name]
        first, last, cut = _elements(info, start, len(buffer))
        buffer[:] = narrow(self.merged(name, first, last), info.dtype)[cut].data

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """As of `Checkpoint`; merged elements are rounded to the tensor's dtype."""
        if name not in self.factors:
            super().read_rows(name, rows, out)
            return
        info = self.tensors[name]
        out[:] = narrow(self.merged_rows(name, rows, out.shape[1] // info.type.itemsize), info.dtype)

    def merged(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Elements ``[first, last)`` of a tensor as they are computed: float32, for F64 float64."""
        info = self.tensors[name]
        raw = np.empty((last - first) * info.type.itemsize, np.uint8)
        super().read_into(name, first * info.type.itemsize, raw.data)
        base = widen(raw, info.dtype)
        if info.dtype != "F64":
            base = base.astype(np.float32)
        if name in self.factors:
            with np.errstate(all="ignore"):  # what overflows is counted where it is scored
                base += self._update(name, first, last)
        return base

    def merged_rows(self, name: str, rows: NDArray[np.integer], width: int) -> NDArray[Any]:
        """As `merged`, rows of ``width`` elements each: ``[len(rows), width]``."""
        info = self.tensors[name]
        if name not in self.factors or width != info.shape[1]:
            return np.stack([self.merged(name, row * width, (row + 1) * width) for row in rows.tolist()])
        raw = np.empty((len(rows), width * info.type.itemsize), np.uint8)
        super().read_rows(name, rows, raw)
        left, right, scale = self._loaded(name)
        base = widen(raw, info.dtype)
        merged: NDArray[Any] = base if info.dtype == "F64" else base.astype(np.float32)
        with np.errstate(all="ignore"):
            merged += (left[rows] @ right) * scale
        return merged

    def _update(self, name: str, first: int, last: int) -> F32:
        columns = self.tensors[name].shape[1]
        low, high = first // columns, -(-last // columns)
        left, right, scale = self._loaded(name)
        update: F32 = (left[low:high] @ right) * scale
        return update.reshape(-1)[first - low * columns : last - low * columns]

    @functools.cached_property
    def _loaded(self) -> Any:
        """Gives a stored tensor's factors, ``[rows, r]`` and ``[r, columns]``, and the scale."""

        @functools.lru_cache(maxsize=_KEPT)
        def load(name: str) -> tuple[F32, F32, np.float32]:
            factor = self.factors[name]
            with np.errstate(all="ignore"):
                a, b = (
                    widen(self.adapter.array_bytes(entry), self.adapter.tensors[entry].dtype).astype(
                        np.float32
                    )
                    for entry in (factor.a, factor.b)
                )
            left, right = (a.T, b.T) if factor.transposed else (b, a)
            return np.ascontiguousarray(left), np.ascontiguousarray(right), np.float32(factor.scale)

        return load

    def check_unchanged(self) -> None:
        """As of `Checkpoint`, of the base and the adapter."""
        super().check_unchanged()
        self.adapter.check_in_place()
        self.adapter.check_unchanged()


@dataclass(frozen=True)
class InFloat32:
    """Weights some of whose tensors read as F32: what an adapter adds is seen before it is rounded."""

    weights: Checkpoint
    names: frozenset[str]

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors, by name."""
        tensors = self.weights.tensors
        return {name: _in_float32(info) if name in self.names else info for name, info in tensors.items()}

    def window(self, name: str, start: int, size: int) -> NDArray[np.uint8] | None:
        """As of `Checkpoint`: only what is not converted lies in memory."""
        same = self.tensors[name] == self.weights.tensors[name]
        return self.weights.window(name, start, size) if same else None

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As of `Checkpoint`."""
        info = self.tensors[name]
        if info == self.weights.tensors[name]:
            self.weights.read_into(name, start, buffer)
            return
        first, last, cut = _elements(info, start, len(buffer))
        buffer[:] = self._values(name, first, last).view(np.uint8)[cut].data

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """As of `Checkpoint`."""
        info = self.tensors[name]
        if info == self.weights.tensors[name]:
            self.weights.read_rows(name, rows, out)
            return
        width = out.shape[1] // info.type.itemsize
        if isinstance(self.weights, Adapted):
            values = self.weights.merged_rows(name, rows, width)
        else:
            raw = np.empty((len(rows), width * self.weights.tensors[name].type.itemsize), np.uint8)
            self.weights.read_rows(name, rows, raw)
            values = widen(raw, self.weights.tensors[name].dtype)
        out[:] = np.ascontiguousarray(values, np.float32).view(np.uint8)

    def _values(self, name: str, first: int, last: int) -> F32:
        if isinstance(self.weights, Adapted):
            return np.ascontiguousarray(self.weights.merged(name, first, last), np.float32)
        info = self.weights.tensors[name]
        raw = np.empty((last - first) * info.type.itemsize, np.uint8)
        self.weights.read_into(name, first * info.type.itemsize, raw.data)
        return widen(raw, info.dtype).astype(np.float32)


def _in_float32(info: TensorInfo) -> TensorInfo:
    """A tensor as `InFloat32` shows it: short floats widened."""
    short = info.dtype in FLOATS and info.type.itemsize < 4
    return TensorInfo(info.name, "F32", info.shape) if short else info


def _elements(info: TensorInfo, start: int, size: int) -> tuple[int, int, slice]:
    """The elements that ``size`` bytes from byte ``start`` are of, and where in theirs these bytes are."""
    itemsize = info.type.itemsize
    first, last = start // itemsize, -(-(start + size) // itemsize)
    return first, last, slice(start - first * itemsize, start - first * itemsize + size)
