"""What apply and revert share: writing vectors into a copy of a checkpoint, or in place."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..checkpoint.changes import Change
from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.folder_files import FolderFiles, SideChange, put_side
from ..checkpoint.healing import heal_recorded
from ..checkpoint.journal import journaled, locked, touched_shards
from ..errors import NeftError, UsageError, naming
from ..neurons.vectors import block_memory, distinct_counts, scatter
from ..options import OutputOptions
from ..patch.overlap import RowSource
from ..patch.patch_file import digests
from ..progress import Progress, Stopwatch, Timing, silent
from ..sources.places import is_url, shown_url
from ..sources.resolve import is_hub_id
from ..storage.copying import copy_file
from ..storage.output import begin_writeback, fsync, staged_directory, staged_file
from ..storage.output_checks import AnyPath, require_space
from ..storage.threads import Limits, in_order
from ..tensors.header import TensorInfo
from ..text import lines, plural, printable
from .verify import PatchState


class WriteOptions(OutputOptions, total=False):
    """The keywords of `plan_apply` and `plan_revert` that say where and how a checkpoint is written."""

    in_place: bool
    limits: Limits | None
    progress: Progress


_TensorRows = tuple[RowSource, str, TensorInfo]  # a tensor of the patch, and one of the file


@dataclass(frozen=True)
class RewriteResult:
    """What `apply` or `revert` did."""

    checkpoint: Path  # the result: ``out``, or the checkpoint that was changed in place
    goal: str  # the state it is in now: ``patched`` or ``base``
    written: bool  # whether anything had to be written
    # How many neurons of how many tensors the patches touch; a lossless one counts no neurons.
    neurons: int = 0
    tensors: int = 0
    left_behind: tuple[Path, ...] = ()  # of the base: other forms of the weights, which are stale
    timing: Timing = field(default_factory=Timing, repr=False)
    files: tuple[str, ...] = ()  # of a lossless patch: those of the result; in place, those that changed

    def __str__(self) -> str:
        if not self.written:
            return printable(f"{self.checkpoint} is {self.goal} already: nothing was written")
        if self.files:
            whole = "the tuned checkpoint" if self.goal == "patched" else "the base"
            return printable(f"{self.checkpoint}: {plural(len(self.files), 'file')}: {whole}, bit for bit")
        what = f"{plural(self.neurons, 'neuron')} in {plural(self.tensors, 'tensor')}"
        now = "patched" if self.goal == "patched" else "in the base"
        said = [f"{self.checkpoint}: {what} are now as {now}"]
        if self.left_behind:
            said.append(f"left behind: {', '.join(str(path) for path in self.left_behind)}")
        return lines(said)


@dataclass(frozen=True)
class RewritePlan:
    """Everything is checked; nothing is written. Made by `plan_apply` and `plan_revert`."""

    checkpoint: Checkpoint
    goal: str  # ``patched`` or ``base``
    rows: Sequence[RowSource]  # in the order of writing: later ones win
    states: Sequence[PatchState]  # one per patch
    out: Path | None  # None: in place
    force: bool
    files: FolderFiles  # the other files of the folder; none for a single file or in place
    warnings: Sequence[str]  # sentences for the user
    timing: Timing  # of checking

    @cached_property
    def neurons(self) -> int:
        """How many neurons any patch replaces, companion biases not counted."""
        if len(self.rows) == 1:
            return self.rows[0].patch.neurons
        found = distinct_counts(
            (tensor.info, tensor.layout, rows.patch.index(name))
            for rows in self.rows
            for name, tensor in rows.patch.own.items()
        )
        return sum(found.values())

    @property
    def tensors(self) -> int:
        """Tensors that any patch touches."""
        return len({name for rows in self.rows for name in rows.patch.tensors})

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the new checkpoint."""
        weights = sum(shard.size for shard in self.checkpoint.shards)
        return weights + sum((self.checkpoint.root / path).stat().st_size for path in self.files.along)

    @property
    def needed(self) -> bool:
        """Whether any vector has to be written."""
        return not all(state.is_done(self.goal) for state in self.states)

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "checkpoint": self.checkpoint.name,
            "out": None if self.out is None else str(self.out),
            "in_place": self.out is None,
            "state_before": [dict(Counter(one.state for one in s.tensors.values())) for s in self.states],
            "tensors": self.tensors,
            "neurons": self.neurons,
            "selected": self.neurons,
            "bytes": None if self.out is None else self.nbytes,
            "captured": self.rows[0].patch.facts.captured if len(self.rows) == 1 else None,
            "left_behind": [str(path) for path in self.files.left],
            "warnings": list(self.warnings),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> RewriteResult:
        """Write the vectors, into a copy or in place."""
        limits = limits or Limits.of()
        with Stopwatch(self.checkpoint) as watch:
            if self.out is not None:
                _write_copy(self, self.out, limits, progress)
            elif self.needed:
                _write_in_place(self, limits, progress)
        watch.bytes_read += sum(rows.patch.value_bytes for rows in self.rows)
        return RewriteResult(
            self.checkpoint.source.path if self.out is None else self.out,
            self.goal,
            self.out is not None or self.needed,
            self.neurons,
            self.tensors,
            self.files.left,
            self.timing + watch.timing,
        )


def require_place(named: AnyPath, out: AnyPath | None, in_place: bool) -> None:
    """Raise a `UsageError` unless it is clear where the result goes, and it may go there."""
    if (out is None) == (not in_place):
        raise UsageError("say where the result goes: give either [[out=...]] or [[in_place=True]]")
    if out is None and (is_hub_id(named) or is_url(named)):
        raise UsageError(
            "a model on the Hub or behind a URL cannot be changed in place",
            file=shown_url(str(named)) if is_url(named) else named,
            hint="write a new checkpoint with [[out=...]]",
        )


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is being written, under a name that nobody looks for yet."""

    path: Path
    fd: int | None  # of the file, if it is one; else it is a folder

    @contextmanager
    def opened(self, name: str, mode: int) -> Iterator[int]:
        """A weight file of it, new and empty."""
        if self.fd is not None:
            yield self.fd
            return
        path = self._place(name)
        with (
            open(path, "x+b", 0, opener=lambda name, flags: os.open(name, flags, mode)) as file,
            naming(path),
        ):
            yield file.fileno()

    def copy_along(
        self, root: Path, paths: Iterable[Path], advance: Callable[[int], None] = lambda done: None
    ) -> None:
        """Copy files of the folder ``root`` that are not weights."""
        for path in paths:
            copy_file(root / path, self._place(path), progress=advance)

    def write(self, name: str, content: bytes) -> None:
        """Write a file that is not weights."""
        self._place(name).write_bytes(content)

    def _place(self, name: AnyPath) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def written_checkpoint(out: Path, *, single: bool, force: bool, nbytes: int) -> Iterator[NewCheckpoint]:
    """Write a checkpoint of so many bytes, a single file or a folder, whole or not at all."""
    with staged_file(out, force=force) if single else staged_directory(out, force=force) as staged:
        require_space(out.absolute().parent, nbytes)
        yield NewCheckpoint(*((staged, None) if isinstance(staged, Path) else (staged.path, staged.fd)))


def _write_copy(plan: RewritePlan, out: Path, limits: Limits, progress: Progress) -> None:
    checkpoint, nbytes, stop = plan.checkpoint, plan.nbytes, threading.Event()
    with (
        progress("copying", nbytes) as advance,
        written_checkpoint(out, single=checkpoint.is_file, force=plan.force, nbytes=nbytes) as new,
    ):

        def step(done: int) -> None:
            if stop.is_set():  # Ctrl-C, or another shard failed: the copies will be removed
                raise InterruptedError
            advance(done)

        def write(file: tuple[Shard, list[_TensorRows]]) -> None:
            shard, tensors = file
            with new.opened(shard.name, 0o600) as fd:
                mode = copy_file(shard.path, fd, progress=step)
                _write_rows(shard, fd, tensors, limits.block)
                os.fchmod(fd, mode)

        for _ in in_order(write, rows_by_file(checkpoint, plan.rows), limits.threads, stop=stop):
            pass
        new.copy_along(checkpoint.root, plan.files.along, advance)
        checkpoint.check_unchanged()
        for rows in plan.rows:
            rows.patch.check_unchanged()


def rows_by_file(checkpoint: Checkpoint, rows: Sequence[RowSource]) -> list[tuple[Shard, list[_TensorRows]]]:
    """Every weight file with what is written into it, in the order of the patches."""
    found: dict[Path, list[_TensorRows]] = {shard.path: [] for shard in checkpoint.shards}
    for one in rows:
        for name, info in one.targets(checkpoint):
            found[checkpoint.shard_of(info.name).path].append((one, name, info))
    return list(zip(checkpoint.shards, found.values(), strict=True))


def _write_rows(
    shard: Shard,
    fd: int,
    tensors: Sequence[_TensorRows],
    block: int | None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    for rows, name, info in tensors:
        tensor, index = rows.patch.tensors[name], rows.patch.index(name)
        offset = shard.header.offsets[info.name]
        place = (fd, offset, info, tensor.layout)
        for start, stop in tensor.blocks(block):
            vectors = rows.read(name, start, stop)
            scatter(*place, index[start:stop], vectors, str(shard.path), block=block)
            advance(vectors.nbytes)
        begin_writeback(fd, offset, tensor.info.nbytes)


def _write_in_place(plan: RewritePlan, limits: Limits, progress: Progress) -> None:
    checkpoint, block = plan.checkpoint, limits.block
    changes = []
    for rows in plan.rows:
        for name, info in rows.targets(checkpoint):
            tensor, index = rows.patch.tensors[name], rows.patch.index(name)
            found = [digests(rows.read(name, start, stop)) for start, stop in tensor.blocks(block)]
            new = np.concatenate([np.empty((0, 16), np.uint8), *found])
            changes.append(Change(info, tensor.layout, index, new, block))
    layouts = [change.layout for change in changes]
    total = sum(rows.patch.value_bytes for rows in plan.rows)
    with (
        progress("writing in place", total) as advance,
        changed_in_place(checkpoint, changes) as descriptors,
    ):

        def write(file: tuple[Shard, list[_TensorRows]]) -> None:
            shard, tensors = file
            with naming(shard.path):
                _write_rows(shard, descriptors[shard.path], tensors, block, advance)

        files = (file for file in rows_by_file(checkpoint, plan.rows) if file[1])
        for _ in in_order(write, files, limits.workers(block_memory(layouts, block))):
            pass
        for rows in plan.rows:
            rows.patch.check_unchanged()


@contextmanager
def changed_in_place(
    checkpoint: Checkpoint, changes: Sequence[Change], side: Sequence[SideChange] = ()
) -> Iterator[dict[Path, int]]:
    """Change a checkpoint in place: yields descriptors by path, to write the vectors of ``changes``.

    At the end they are synced, and then files beside the weights are replaced. After an exception the change
    is undone at once if possible.
    """
    shards = touched_shards(checkpoint, changes)
    try:
        with locked(checkpoint, shards) as descriptors:
            checkpoint.check_unchanged()  # it was examined without the lock
            with journaled(checkpoint, changes, side):
                yield descriptors
                for path, fd in descriptors.items():
                    with naming(path):
                        fsync(fd)
                for one in side:
                    put_side(checkpoint.root / one.name, one.content and one.content(), one.mode)
    except BaseException:
        # The journal, if there is one already, is still there.
        with suppress(NeftError, OSError):
            heal_recorded(checkpoint.source)
        raise
