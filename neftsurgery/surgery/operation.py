"""Carrying out a planned apply or revert: into a copy of the checkpoint, or in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.folder_files import FolderFiles
from ..checkpoint.healing import heal_recorded
from ..checkpoint.journal import Change, journaled, locked
from ..errors import NeftError
from ..neurons.vectors import block_memory, scatter
from ..patch.digests import digests
from ..patch.patch import Patch, Raw
from ..progress import Progress, Timing, silent
from ..storage.copying import copy_file
from ..storage.output import begin_writeback, fsync, staged_directory, staged_file
from ..storage.output_checks import require_space
from ..storage.threads import Limits, in_order
from .state import PatchState

__all__ = ["Rows", "Surgery", "operate", "touched_files"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The vectors to write for one patch, by tensor: its values, or the ones they replaced."""

    patch: Patch
    read: Callable[[str, int, int], Raw]


@dataclass(frozen=True)
class Surgery:
    """A planned apply or revert: everything is checked, nothing is written yet.

    Attributes
    ----------
    checkpoint:
        What is operated on.
    rows:
        What is written, in order; later ones win.
    states:
        The state the checkpoint is in, per patch.
    out:
        Where the result goes; None: in place.
    force:
        Whether ``out`` may be replaced.
    files:
        The other files of the folder; None for a single file or in place.
    needed:
        Whether any vector differs from what it shall be.
    timing:
        What it took so far.
    """

    checkpoint: Checkpoint
    rows: Sequence[Rows]
    states: Sequence[PatchState]
    out: Path | None
    force: bool
    files: FolderFiles | None
    needed: bool
    timing: Timing

    @property
    def neurons(self) -> int:
        """Neurons of all patches together."""
        return sum(rows.patch.neurons for rows in self.rows)


def touched_files(checkpoint: Checkpoint, patches: Sequence[Patch]) -> list[Shard]:
    """The weight files that hold a tensor of ``patches``."""
    paths = {checkpoint.shard_of(name).path for patch in patches for name in patch.tensors}
    return [shard for shard in checkpoint.shards if shard.path in paths]


def operate(plan: Surgery, *, limits: Limits, progress: Progress = silent) -> None:
    """Carry out a planned apply or revert."""
    with plan.timing.clock():
        if plan.out is not None:
            _write_copy(plan, plan.out, limits, progress)
        elif plan.needed:
            _write_in_place(plan, limits, progress)
    plan.timing.bytes_read = plan.checkpoint.bytes_read + sum(r.patch.value_bytes for r in plan.rows)


def _write_copy(plan: Surgery, out: Path, limits: Limits, progress: Progress) -> None:
    checkpoint = plan.checkpoint
    along = () if plan.files is None else plan.files.along
    sizes = [shard.size for shard in checkpoint.shards]
    sizes += [(checkpoint.root / path).stat().st_size for path in along]
    parent, touched = out.absolute().parent, _touched(plan)
    with progress("copying", sum(sizes)) as advance:
        if checkpoint.is_file:
            with staged_file(out, force=plan.force) as staged:
                require_space(parent, sum(sizes))
                shard = checkpoint.shards[0]
                _write_shard(shard, staged.fd, touched.get(shard.path, ()), advance)
                _check_unchanged(plan)
            return
        with staged_directory(out, force=plan.force) as folder:
            require_space(parent, sum(sizes))

            stop = threading.Event()

            def step(done: int) -> None:
                if stop.is_set():  # Ctrl-C, or another shard failed: what is copied will be thrown away
                    raise InterruptedError
                advance(done)

            def write(shard: Shard) -> None:
                fd = os.open(
                    folder / shard.path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
                try:
                    _write_shard(shard, fd, touched.get(shard.path, ()), step)
                finally:
                    os.close(fd)

            for _ in in_order(write, checkpoint.shards, limits.threads, stop=stop):
                pass
            for path in along:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                copy_file(checkpoint.root / path, folder / path, progress=advance)
            _check_unchanged(plan)


def _check_unchanged(plan: Surgery) -> None:
    """Raise a `MachineError` if anything that was read is not what was checked."""
    plan.checkpoint.check_unchanged()
    for rows in plan.rows:
        rows.patch.check_unchanged()


def _write_shard(shard: Shard, fd: int, tensors: Sequence[_Touched], advance: Callable[[int], None]) -> None:
    """Copy a weight file to the empty file ``fd`` and write the rows that lie in it."""
    mode = copy_file(shard.path, fd, progress=advance)
    _write_rows(shard, fd, tensors)
    os.fchmod(fd, mode)


@dataclass(frozen=True, slots=True)
class _Touched:
    """One tensor's rows of one patch."""

    rows: Rows
    name: str


def _touched(plan: Surgery) -> dict[Path, list[_Touched]]:
    """By weight file what is written there, patch by patch."""
    found: dict[Path, list[_Touched]] = {}
    for rows in plan.rows:
        for name in rows.patch.tensors:
            found.setdefault(plan.checkpoint.shard_of(name).path, []).append(_Touched(rows, name))
    return found


def _write_rows(
    shard: Shard, fd: int, tensors: Sequence[_Touched], advance: Callable[[int], None] = lambda done: None
) -> None:
    for touched in tensors:
        name, rows = touched.name, touched.rows
        tensor, index = rows.patch.tensors[name], rows.patch.index(name)
        offset = shard.header.offsets[name]
        for start, stop in tensor.blocks():
            vectors = rows.read(name, start, stop)
            scatter(fd, offset, tensor.info, tensor.layout, index[start:stop], vectors, str(shard.path))
            advance(vectors.nbytes)
        begin_writeback(fd, offset, tensor.info.nbytes)


def _write_in_place(plan: Surgery, limits: Limits, progress: Progress) -> None:
    checkpoint = plan.checkpoint
    changes = [
        Change(tensor.info, tensor.layout, rows.patch.index(name), _digests(rows, name))
        for rows in plan.rows
        for name, tensor in rows.patch.tensors.items()
    ]
    layouts = [change.layout for change in changes]
    touched = _touched(plan)
    shards = [shard for shard in checkpoint.shards if shard.path in touched]
    total = sum(rows.patch.value_bytes for rows in plan.rows)
    try:
        with progress("writing in place", total) as advance, locked(checkpoint, shards) as held:
            checkpoint.check_unchanged()  # since it was examined, which needed no lock

            def write(shard: Shard) -> None:
                _write_rows(shard, held[shard.path], touched[shard.path], advance)

            with journaled(checkpoint, changes):
                for _ in in_order(write, shards, limits.workers(block_memory(layouts))):
                    pass
                for rows in plan.rows:
                    rows.patch.check_unchanged()
                for shard in shards:
                    fsync(held[shard.path])
    except BaseException:
        # The journal, if it was begun, is still there: undo at once what can be undone at once.
        with suppress(NeftError, OSError):
            heal_recorded(checkpoint.source)
        raise


def _digests(rows: Rows, name: str) -> Raw:
    blocks = [digests(rows.read(name, start, stop)) for start, stop in rows.patch.tensors[name].blocks()]
    return np.concatenate(blocks) if blocks else np.empty((0, 16), np.uint8)
