"""What a change in place replaces in one tensor: vectors of neurons, or ranges of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import naming
from ..neurons.layout import Layout
from ..neurons.vectors import blocks, gather, scatter
from ..storage.positioned import write_exactly
from ..tensors.arrays import RawBytes
from ..tensors.header import TensorInfo
from .checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Vectors of one tensor that are replaced, of which there may be several changes; or ranges of bytes."""

    view: TensorInfo  # the tensor; of `of_ranges`, as bytes: a range a row, the last one filled up with zeros
    layout: Layout  # of the view
    index: NDArray[np.int64]  # the neurons, ascending, [k]
    new_digests: NDArray[np.uint8]  # XXH3-128 of their new vectors, [k, 16]
    block: int | None = None  # as in `storage.threads.Limits`

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.view.name

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Positions in the index, in ranges of bounded size."""
        return blocks(self.view, self.layout, len(self.index), self.block)

    @classmethod
    def of_ranges(
        cls, info: TensorInfo, size: int, index: NDArray[np.int64], new_digests: NDArray[np.uint8]
    ) -> Change:
        """Changed ranges of ``size`` bytes of a tensor, by number."""
        shape = (-(-info.nbytes // size), size)
        return cls(TensorInfo(info.name, "U8", shape), Layout.of(shape, (0,)), index, new_digests)

    def is_of(self, info: TensorInfo | None) -> bool:
        """Whether it is about a tensor: its vectors, or ranges of its bytes."""
        if info is None or self.view == info:
            return info is not None
        ranges = self.view.dtype == "U8" and len(self.view.shape) == 2 and self.layout.axes == (0,)
        return ranges and 0 <= self.view.nbytes - info.nbytes < max(1, self.layout.width)

    def is_of_ranges(self, checkpoint: Checkpoint) -> bool:
        """Whether it replaces ranges of the bytes of a checkpoint's tensor, not vectors."""
        return self.view != checkpoint.tensors[self.name]

    def _last(self, checkpoint: Checkpoint, index: NDArray[np.int64]) -> int:
        """If the last of these is a range that is filled up, how many bytes of it there are; else 0."""
        more = self.view.nbytes - checkpoint.tensors[self.name].nbytes
        return self.layout.width - more if more and index[-1:] == self.layout.count - 1 else 0

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> RawBytes:
        """The vectors at ``[start, stop)`` of the index, as the checkpoint has them now."""
        index = self.index[start:stop]
        if not (last := self._last(checkpoint, index)):
            return gather(checkpoint, self.view, self.layout, index, block=self.block)
        found = np.zeros((len(index), self.layout.width), np.uint8)
        found[:-1] = gather(checkpoint, self.view, self.layout, index[:-1])
        checkpoint.read_into(self.name, int(index[-1]) * self.layout.width, found[-1, :last].data)
        return found

    def write(self, checkpoint: Checkpoint, fd: int, start: int, vectors: RawBytes) -> None:
        """Write vectors over those from ``start`` of the index on, in the weight file ``fd``."""
        index, shard = self.index[start : start + len(vectors)], checkpoint.shard_of(self.name)
        offset = shard.header.offsets[self.name]
        with naming(shard.path):
            if last := self._last(checkpoint, index):
                write_exactly(fd, vectors[-1, :last].data, offset + int(index[-1]) * self.layout.width)
                index, vectors = index[:-1], vectors[:-1]
            scatter(fd, offset, self.view, self.layout, index, vectors, str(shard.path))


def changes_by_tensor(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Changes by tensor name."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.name, []).append(change)
    return found
