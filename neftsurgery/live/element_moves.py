"""Where functions of torch move the elements of tensors, recorded on the meta device: nothing is computed.

A view has its tensor's storage, and its strides tell where its elements lie. The functions that copy elements
are few and known by name. What any other function makes has no known origin, so no element is found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["MoveRecorder", "Offsets"]

Offsets: TypeAlias = NDArray[np.int64]

_JOINS = {"cat", "concat", "concatenate", "stack"}
_COPIES = {"clone", "contiguous", "flatten", "ravel", "reshape"}  # in row-major order, if at all


@dataclass(frozen=True)
class _View:
    """Where the elements of a tensor lie in its storage."""

    storage: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        storage: int = tensor.untyped_storage()._cdata
        return cls(storage, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def coordinates(self, offsets: Offsets) -> tuple[NDArray[np.bool_], list[Offsets]]:
        """Which elements of the storage, at ``offsets``, the view has, and the coordinates of these."""
        rest = offsets - self.offset
        inside = rest >= 0
        found = [np.zeros_like(rest)] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]):
            if self.shape[axis] != 1:
                found[axis], rest = np.divmod(rest, max(1, self.strides[axis]))
                inside &= found[axis] < self.shape[axis]
        inside &= rest == 0
        return inside, [each[inside] for each in found]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> tuple[Sequence[Tensor], int]:
    return tensors, dim


class MoveRecorder(TorchFunctionMode):
    """Within the context, records where the elements of float32 tensors go."""

    def __init__(self) -> None:
        super().__init__()
        self._moves: dict[int, list[tuple[_View, _View]]] = {}  # by the storage they come from
        self._numbers: dict[int, int] = {}  # of the results, by storage
        self._seen: list[Any] = []  # kept, so that no storage is taken for another

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``function``, and record what it copies."""
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in _JOINS:
            sources, axis = _joined(*args, **(kwargs or {}))
            sizes = [source.shape[axis] for source in sources] if name != "stack" else ()
            parts = result.split(sizes, axis) if sizes else result.unbind(axis)
            for source, part in zip(sources, parts, strict=True):
                self._record(source, _View.of(part))
        elif name in _COPIES and _View.of(result).storage != _View.of(args[0]).storage:
            self._record(args[0], _View.of(result.view(args[0].shape)))
        self._seen.append(result)
        return result

    def _record(self, source: Tensor, target: _View) -> None:
        if source._version or source.dtype != torch.float32:
            raise ValueError("values are changed in place")
        view = _View.of(source)
        self._moves.setdefault(view.storage, []).append((view, target))
        self._seen.append(source)

    def end(self, results: Sequence[Tensor]) -> None:
        """Say which tensors came out: `follow` tells where elements are in these."""
        for number, result in enumerate(results):
            self._seen.append(torch.empty(result.shape, device="meta"))
            final = _View.of(self._seen[-1])
            self._numbers[final.storage] = number
            self._record(result, final)

    def follow(self, source: Tensor, offsets: Offsets) -> tuple[Offsets, Offsets]:
        """Where elements of ``source``, row-major, came out: the numbers of results, and row-major there.

        The number is -1 for an element that no result has. A ValueError if one is in several places.
        """
        return self._follow(_View.of(source).storage, offsets)

    def _follow(self, storage: int, offsets: Offsets) -> tuple[Offsets, Offsets]:
        if storage in self._numbers:
            return np.full_like(offsets, self._numbers[storage]), offsets
        numbers, found = np.full_like(offsets, -1), np.zeros_like(offsets)
        for view, target in self._moves.get(storage, ()):
            inside, coordinates = view.coordinates(offsets)
            moved = np.full(inside.sum(), target.offset)
            for at, stride in zip(coordinates, target.strides, strict=True):
                moved += at * stride
            reached, moved = self._follow(target.storage, moved)
            where = np.flatnonzero(inside)[reached >= 0]
            if (numbers[where] >= 0).any():
                raise ValueError("an element is copied to several places")
            numbers[where], found[where] = reached[reached >= 0], moved[reached >= 0]
        return numbers, found
