"""apply and revert of lossless patches: whole checkpoints from their difference, written anew or in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from ..checkpoint.changes import Change
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import SideChange, folder_files, side_digest, side_files
from ..checkpoint.journal import require_writable, touched_shards
from ..checkpoint.provenance import fingerprint
from ..coding.elements import Carrier
from ..errors import CorruptFileError, UsageError
from ..patch.delta import DeltaBlock, WeightFile, block_hash, blocks_of, read_block
from ..patch.lossless import LosslessPatch
from ..patch.patch_file import digests
from ..progress import Progress, Stopwatch, Timing, silent
from ..sources.resolve import Source, is_index
from ..storage.output import begin_writeback
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.positioned import write_exactly
from ..storage.threads import Limits, in_order
from ..tensors.arrays import Int64Array, RawBytes
from ..tensors.json_text import loads
from .chains import links_from, require_end
from .model_files import BLOCK_MEMORY, ModelFiles, RebuiltWeights, another_checkpoint, require_result
from .rewrite import RewriteResult, changed_in_place, require_place, written_checkpoint

#: Bytes that are journaled and written together. Every block begins with such a range.
_RANGE = 1 << 16


@dataclass(frozen=True)
class RebuildPlan:
    """A checkpoint to be written anew or changed in place. Made by `plan_rebuild`; nothing is written yet."""

    named: Checkpoint  # what is changed in place, or read
    checkpoint: Checkpoint  # what is read
    patches: tuple[LosslessPatch, ...]
    target: ModelFiles
    goal: str  # ``patched`` or ``base``
    out: Path | None  # None: in place
    force: bool
    along: tuple[Path, ...]  # files of `checkpoint` that are copied
    changes: tuple[Change, ...]  # in place: ranges of bytes, and files beside the weights
    side_changes: tuple[SideChange, ...]
    timing: Timing
    warnings: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """Whether anything has to be written."""
        return self.out is not None or bool(self.changes or self.side_changes)

    @property
    def nbytes(self) -> int:
        """Bytes of what is written, files that are copied along not counted; in place, of weights."""
        if self.out is None:
            return sum(len(change.index) * change.layout.width for change in self.changes)
        return self.target.nbytes + self.target.side_bytes

    @property
    def side(self) -> list[str]:
        """The files beside the weights that are written, not copied along."""
        return [name for name in self.target.side if Path(name) not in self.along]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the files that are written."""
        if self.out is None:
            shards = touched_shards(self.named, self.changes) if self.changes else []
            return (*(shard.name for shard in shards), *(one.name for one in self.side_changes))
        return (*(file.name for file in self.target.files), *self.side, *map(str, self.along))

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "checkpoint": self.named.name,
            "patches": [patch.name for patch in self.patches],
            "lossless": True,
            "out": None if self.out is None else str(self.out),
            "in_place": self.out is None,
            "tensors": len(self.target.weights.tensors),
            "files": list(self.names),
            "bytes": self.nbytes,
            "not_carried": list(self.target.not_carried),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> RewriteResult:
        """Write the checkpoint; every block is checked before and after."""
        limits = limits or Limits.of()
        with Stopwatch(self.checkpoint) as watch:
            if self.out is not None:
                self._write(self.out, limits, progress)
            elif self.needed:
                self._write_in_place(limits, progress)
        return RewriteResult(
            self.out or self.named.source.path,
            self.goal,
            self.needed,
            tensors=len(self.target.weights.tensors),
            timing=self.timing + watch.timing,
            files=self.names,
        )

    def _write(self, out: Path, limits: Limits, progress: Progress) -> None:
        target = self.target
        with (
            progress("writing", target.nbytes) as advance,
            written_checkpoint(out, single=target.single, force=self.force, nbytes=self.nbytes) as new,
        ):
            for name in self.side:
                new.write(name, target.side[name]())
            for file in target.files:
                with new.opened(file.name, 0o666) as fd:
                    self._write_weights(file, fd, limits, advance)
            new.copy_along(self.checkpoint.root, self.along)
            self._check_result(Source(new.path, str(out)))

    def _write_in_place(self, limits: Limits, progress: Progress) -> None:
        checkpoint, changes = self.named, {change.name: change for change in self.changes}
        with (
            progress("writing in place", self.nbytes) as advance,
            changed_in_place(checkpoint, self.changes, self.side_changes) as descriptors,
        ):

            def write(block: DeltaBlock) -> int:
                change, first = changes[block.info.name], _first(block)
                rows = _ranges(block, self.target.read(block))
                low, high = _within(change, block)
                fd = descriptors[checkpoint.shard_of(block.info.name).path]
                change.write(checkpoint, fd, low, rows[change.index[low:high] - first])
                begin_writeback(fd, block.offset, block.nbytes)
                return (high - low) * change.layout.width

            for file in self.target.files:  # one by one: a file that was written is not opened again to read
                touched = (block for block in blocks_of([file]) if block.info.name in changes)
                blocks = (block for block in touched if np.diff(_within(changes[block.info.name], block)))
                for _, done in in_order(write, blocks, limits.workers(BLOCK_MEMORY)):
                    advance(done)
            self._check_result(checkpoint.source)

    def _check_result(self, source: Source) -> None:
        """What was written must have the fingerprint that the patch records."""
        patch = self.patches[-1]
        for one in self.patches:
            one.check_unchanged()
        if source.path != self.checkpoint.source.path:  # else it was changed here
            self.checkpoint.check_unchanged()
        expected = patch.tuned if self.goal == "patched" else patch.base
        try:
            found = fingerprint(Checkpoint.read(source))
        except (CorruptFileError, UsageError) as error:
            found = error.what
        require_result(found, patch, expected)

    def _write_weights(
        self, file: WeightFile, fd: int, limits: Limits, advance: Callable[[int], None]
    ) -> None:
        os.ftruncate(fd, file.nbytes)
        write_exactly(fd, file.start, 0)
        advance(file.header.size)

        def write(block: DeltaBlock) -> None:
            write_exactly(fd, self.target.read(block).data.cast("B"), block.offset)
            begin_writeback(fd, block.offset, block.nbytes)

        for block, _ in in_order(write, blocks_of([file]), limits.workers(BLOCK_MEMORY)):
            advance(block.nbytes)


def plan_rebuild(
    named: AnyPath,
    patches: Sequence[LosslessPatch],
    goal: str,
    *,
    base: AnyPath | None = None,
    out: AnyPath | None = None,
    in_place: bool = False,
    force: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> RebuildPlan:
    """Check everything that applying or reverting lossless patches needs; nothing is written."""
    last = patches[-1]
    require_place(named, out, in_place)
    if goal == "base" and base is None and last.backward is None:
        raise UsageError(
            "the patch does not hold the way back",
            file=last.place,
            hint="name the checkpoint it was made from with [[base=...]]; [[reversible=True]] makes patches "
            "that hold the way back",
        )
    with Stopwatch() as watch:
        here = checkpoint = Checkpoint.open(named)
        inputs = [here.source.path, *(patch.path for patch in patches if patch.path is not None)]
        if goal == "patched":
            patches = links_from(here, patches)
        else:
            require_end(last, here, last.tuned, last.base)
        if goal == "patched" or base is None:
            target = RebuiltWeights.model(here, patches, goal)
        else:
            checkpoint = Checkpoint.open(base)
            inputs.append(checkpoint.source.path)
            require_end(last, checkpoint, last.base)
            target = replace(ModelFiles.of(checkpoint), base_of=last, not_carried=())
        weights_only = any(patch.weights_only for patch in patches)
        along: tuple[Path, ...] = ()
        if not target.single and (weights_only or checkpoint is not here):
            own = {file.name for file in target.files}
            copied = folder_files(checkpoint).along
            along = tuple(path for path in copied if str(path) not in own and not is_index(path.name))
        place = refuse_output(out, inputs=inputs, force=force, kind="file" if target.single else "directory")
        changes, side_changes = list[Change](), list[SideChange]()
        if place is None:
            require_same_layout(here, target)
            require_writable(here, here.shards)
            changes += _changed_ranges(here, target, limits or Limits.of(), progress)
            side_changes += _side(here, target, weights_only)
    watch.bytes_read = here.bytes_read
    how = (target, goal, place, force, along, (*changes,), (*side_changes,), watch.timing)
    return RebuildPlan(here if place is None else checkpoint, checkpoint, (*patches,), *how)


def _changed_ranges(
    checkpoint: Checkpoint, target: ModelFiles, limits: Limits, progress: Progress
) -> Iterator[Change]:
    """The ranges of bytes that differ; of a base that was named, only what its patch makes may."""
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
    for name, info in checkpoint.tensors.items():
        if name in found:
            parts = map(np.concatenate, zip(*found[name], strict=True))
            yield Change.of_ranges(info, _size(info.nbytes), *parts)


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
        if shard.raw_header() == file.start:
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
