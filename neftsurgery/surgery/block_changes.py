"""Lossless patches in place: which bytes of a checkpoint change, found before the first one is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from ..checkpoint.changes import Change
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.journal import touched_shards
from ..checkpoint.side_files import SideChange, side_digest, side_files
from ..coding.elements import Carrier
from ..errors import UsageError
from ..patch.delta import DeltaBlock, block_hash, blocks_of, read_block
from ..patch.digests import digests
from ..progress import Progress
from ..sources.resolve import is_index
from ..storage.output import begin_writeback
from ..storage.output_checks import AnyPath
from ..storage.threads import Limits, in_order
from ..tensors.arrays import Int64Array, RawBytes
from ..tensors.json_text import loads
from .model_files import BLOCK_MEMORY, ModelFiles, another_checkpoint, weight_file
from .rewrite import changed_in_place

#: Bytes that are journaled and written together. Every block begins with such a range.
_RANGE = 1 << 16


@dataclass(frozen=True)
class BlockChanges:
    """What makes a checkpoint another one with the same files. Made by `find`; nothing is written yet."""

    checkpoint: Checkpoint
    target: ModelFiles
    changes: tuple[Change, ...]  # ranges of bytes
    side: tuple[SideChange, ...]

    @classmethod
    def find(
        cls,
        checkpoint: Checkpoint,
        target: ModelFiles,
        weights_only: bool,
        limits: Limits,
        progress: Progress,
    ) -> BlockChanges:
        """Compare every block with what it becomes.

        If that is a base that was named, only what its patch makes may change.
        """
        patch = target.base_of
        found: dict[str, list[tuple[Int64Array, RawBytes]]] = {}

        def look(block: DeltaBlock) -> tuple[Int64Array, RawBytes]:
            old, new = read_block(checkpoint, block), target.read(block)
            if patch is not None and not np.array_equal(old, new):
                made = patch.forward.block_at(block.info.name, block.start)
                if made is None or block_hash(old) != int(patch.forward.after[made.number]):
                    raise another_checkpoint(patch, checkpoint, block)
            rows = _ranges(block, new)
            index = np.flatnonzero((rows != _ranges(block, old)).any(axis=1))
            return index + _first(block), digests(rows[index])

        blocks = [*blocks_of(target.files)]
        with progress("checking", sum(block.nbytes for block in blocks)) as advance:
            for block, changed in in_order(look, blocks, limits.workers(BLOCK_MEMORY)):
                if len(changed[0]):
                    found.setdefault(block.info.name, []).append(changed)
                advance(block.nbytes)
        changes = tuple(
            Change.of_ranges(info, _size(info.nbytes), *map(np.concatenate, zip(*found[name], strict=True)))
            for name, info in checkpoint.tensors.items()
            if name in found
        )
        return cls(checkpoint, target, changes, tuple(_side(checkpoint, target, weights_only)))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are written."""
        return sum(len(change.index) * change.layout.width for change in self.changes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that change."""
        shards = touched_shards(self.checkpoint, self.changes) if self.changes else []
        return (*(shard.name for shard in shards), *(one.name for one in self.side))

    def write(self, finish: Callable[[], None], limits: Limits, progress: Progress) -> None:
        """Make the changes; ``finish`` checks the weights when all are written."""
        changes = {change.name: change for change in self.changes}
        with (
            progress("writing in place", self.nbytes) as advance,
            changed_in_place(self.checkpoint, self.changes, self.side) as descriptors,
        ):

            def write(block: DeltaBlock) -> int:
                change, first = changes[block.info.name], _first(block)
                rows = _ranges(block, self.target.read(block))
                low, high = _within(change, block)
                fd = descriptors[self.checkpoint.shard_of(block.info.name).path]
                change.write(self.checkpoint, fd, low, rows[change.index[low:high] - first])
                begin_writeback(fd, block.offset, block.nbytes)
                return (high - low) * change.layout.width

            for file in self.target.files:  # one by one: a file that was written is not opened again to read
                touched = (block for block in blocks_of([file]) if block.info.name in changes)
                blocks = (block for block in touched if np.diff(_within(changes[block.info.name], block)))
                for _, done in in_order(write, blocks, limits.workers(BLOCK_MEMORY)):
                    advance(done)
            finish()


def _size(nbytes: int) -> int:
    """Bytes of a range of a tensor of so many bytes."""
    return min(nbytes, _RANGE)


def _first(block: DeltaBlock) -> int:
    """The number of the range that a block begins with."""
    return block.start * block.elements.size // _size(block.info.nbytes)


def _ranges(block: DeltaBlock, elements: Carrier) -> RawBytes:
    """The bytes of a block, a range a row; the last is filled up with zeros."""
    raw, size = elements.view(np.uint8), _size(block.info.nbytes)
    return np.pad(raw, (0, -len(raw) % size)).reshape(-1, size)


def _within(change: Change, block: DeltaBlock) -> tuple[int, int]:
    """Which of the changed ranges of a tensor are in a block."""
    first, count = _first(block), -(-block.nbytes // change.layout.width)
    low, high = np.searchsorted(change.index, [first, first + count]).tolist()
    return low, high


def _side(checkpoint: Checkpoint, target: ModelFiles, weights_only: bool) -> Iterator[SideChange]:
    """The files beside the weights that differ. Of ``weights_only``, that is an index at most."""
    if checkpoint.is_file:
        return
    for name in sorted({*side_files(checkpoint)[0], *target.side}):
        if weights_only and not is_index(name):
            continue
        read = target.side.get(name)
        content = None if read is None else read()
        new = None if content is None else xxhash.xxh3_128_hexdigest(content)
        old, mode = side_digest(checkpoint.root / name)
        if is_index(name) and content is not None and new != old:
            _require_index(checkpoint, name, content)
        if new != old:
            yield SideChange(name, old, new, mode, read)


def _require_index(checkpoint: Checkpoint, name: str, content: bytes) -> None:
    """The new index must lead to the files that are there, or nothing could read them any more."""
    try:
        listed = {*loads(content)["weight_map"].values()}
    except (ValueError, TypeError, LookupError, AttributeError):
        listed = set()
    part = name[: name.rfind("/") + 1]
    if {f"{part}{file}" for file in listed} != {s.name for s in checkpoint.shards if s.part == part}:
        raise _other_files(checkpoint.root / name, None, "an index of the files that are there", "another")


def require_same_layout(checkpoint: Checkpoint, target: ModelFiles) -> None:
    """Raise a `UsageError` unless both have the same weight files, with the same headers, to the byte."""
    if checkpoint.is_file != target.single:
        kinds = {True: "a file", False: "a folder"}
        raise _other_files(checkpoint.name, None, kinds[target.single], kinds[checkpoint.is_file])
    here = {shard.name: shard for shard in checkpoint.shards}
    names = here.keys() if target.single else {file.name for file in target.files}
    for name in sorted(here.keys() ^ names):
        sides = ("a weight file", "none") if name in names else ("no such file", "one")
        raise _other_files(checkpoint.root / name, None, *sides)
    for file in target.files:
        shard = checkpoint.shards[0] if target.single else here[file.name]
        if weight_file(shard).raw == file.raw:
            continue
        old, new = shard.header.tensors, file.header.tensors
        for name in sorted(old.keys() | new.keys()):
            if (first := old.get(name)) != (second := new.get(name)):
                wanted, found = ("no such tensor" if t is None else t.describe() for t in (second, first))
                raise _other_files(shard.path, name, wanted, found)
        raise _other_files(shard.path, None, "the header of the result", "other metadata, order or spacing")


def _other_files(file: AnyPath, tensor: str | None, expected: str, found: str) -> UsageError:
    return UsageError(
        "it cannot be changed in place: the result has other files or headers",
        file=file,
        tensor=tensor,
        expected=expected,
        found=found,
        hint="write a new checkpoint with [[out=...]]",
    )
