"""Where functions of torch move the elements of tensors, recorded on the meta device: nothing is computed.

A view has its tensor's storage, and its strides tell where its elements lie. The functions that copy elements
are few and known by name. What any other function makes has no known origin, so no element is found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

Offsets: TypeAlias = NDArray[np.int64]

_JOINS = {"cat", "concat", "concatenate", "stack"}
_COPIES = {"clone", "contiguous", "flatten", "ravel", "reshape"}  # in row-major order, if at all


class MoveRecorder(TorchFunctionMode):
    """Within the context, records where the elements of float32 tensors go."""

    def __init__(self) -> None:
        super().__init__()
        self._moves: dict[int, list[tuple[Tensor, Tensor]]] = {}  # views, by the storage of the first
        self._results: dict[int, int] = {}  # the numbers of the results, by storage
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
                self._record(source, part)
        elif name in _COPIES and _storage(result) != _storage(args[0]):
            self._record(args[0], result.view(args[0].shape))
        self._seen.append(result)
        return result

    def _record(self, source: Tensor, target: Tensor) -> None:
        if source._version or source.dtype != torch.float32:
            raise ValueError("transformers changes its values in place")
        self._moves.setdefault(_storage(source), []).append((source, target))

    def end(self, results: Sequence[Tensor]) -> None:
        """Say which tensors came out: `follow` tells where elements are in these."""
        for number, result in enumerate(results):
            final = torch.empty(result.shape, device="meta")
            self._results[_storage(final)] = number
            self._record(result, final)

    @property
    def moves(self) -> int:
        """How many times elements were moved."""
        return sum(map(len, self._moves.values()))

    def follow(self, source: Tensor, offsets: Offsets) -> tuple[Offsets, Offsets]:
        """Where elements of ``source``, row-major, came out: numbers of results, -1 for none, and where."""
        return self._follow(_storage(source), offsets)

    def _follow(self, storage: int, offsets: Offsets) -> tuple[Offsets, Offsets]:
        if storage in self._results:
            return np.full_like(offsets, self._results[storage]), offsets
        numbers, found = np.full_like(offsets, -1), np.zeros_like(offsets)
        for source, target in self._moves.get(storage, ()):
            inside, coordinates = _coordinates(source, offsets)
            moved = np.full(len(inside), int(target.storage_offset()))
            for at, stride in zip(coordinates, target.stride(), strict=True):
                moved += at * stride
            reached, moved = self._follow(_storage(target), moved)
            where = inside[reached >= 0]
            if (numbers[where] >= 0).any():
                raise ValueError("transformers copies it to several places")
            numbers[where], found[where] = reached[reached >= 0], moved[reached >= 0]
        return numbers, found


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> tuple[Sequence[Tensor], int]:
    return tensors, dim


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _coordinates(view: Tensor, offsets: Offsets) -> tuple[Offsets, list[Offsets]]:
    """Which of the elements at ``offsets`` of the storage are in ``view``, and their coordinates there."""
    shape, strides = view.shape, view.stride()
    rest = offsets - int(view.storage_offset())
    inside = rest >= 0
    found = [np.zeros_like(rest)] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: -strides[axis]):
        if shape[axis] != 1:
            found[axis], rest = np.divmod(rest, max(1, strides[axis]))
            inside &= found[axis] < shape[axis]
    where = np.flatnonzero(inside & (rest == 0))
    return where, [each[where] for each in found]
