"""apply and revert: rows written into a copy of a checkpoint, or in place; checked before, never after.

Both are one operation: put every touched vector into one of its two known states.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.copying import copy_file
from ..checkpoint.journal import Change, heal, journaled, locked
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.output import staged_directory, staged_file
from ..checkpoint.pipeline import in_order
from ..checkpoint.refusal import refuse_output, require_space
from ..checkpoint.vectors import gather, scatter
from ..errors import MismatchError, NeftError, UsageError, boundary
from ..patch.digests import digests
from ..patch.patch import Patch, Raw
from .files import FolderFiles, folder_files
from .progress import Progress, Timing, silent
from .state import PatchState, check_fit, examine

__all__ = ["Rows", "Surgery", "apply", "operate", "plan_apply", "plan_revert", "revert"]

_Out = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Rows:
    """The vectors to write for one patch, by tensor: its values, or the ones they replaced."""

    patch: Patch
    read: Callable[[str, int, int], Raw]


@dataclass
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
    files:
        The other files of the folder; None for a single file or in place.
    needed:
        Whether any vector differs from what it shall be.
    """

    checkpoint: Checkpoint
    rows: Sequence[Rows]
    states: Sequence[PatchState]
    out: Path | None
    force: bool
    files: FolderFiles | None
    needed: bool
    timing: Timing = field(default_factory=Timing)

    @property
    def touched(self) -> list[Shard]:
        """The weight files that hold a touched tensor."""
        names = {name for rows in self.rows for name in rows.patch.tensors}
        paths = {self.checkpoint.shard_of(name).path for name in names}
        return [shard for shard in self.checkpoint.shards if shard.path in paths]

    @property
    def neurons(self) -> int:
        """Neurons of all patches together."""
        return sum(rows.patch.neurons for rows in self.rows)


@boundary
def apply(
    base: _Out,
    patches: Patch | _Out | Sequence[Patch | _Out],
    *,
    out: _Out | None = None,
    in_place: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write a patched checkpoint.

    Parameters
    ----------
    base:
        A checkpoint: a file, a folder, or a Hub id. It may be patched already, or partly.
    patches:
        A patch, or several, each a `Patch` or a path; each is checked against the state that the
        ones before it leave.
    out:
        The new checkpoint: a file for a file, else a folder. It appears whole or not at all.
    in_place:
        Change ``base`` itself: only the touched rows are written, their old bytes journaled first.
    force:
        Replace ``out`` if it exists.

    Raises
    ------
    UsageError
        If ``out`` exists or makes no sense, or ``base`` cannot be changed in place.
    MismatchError
        If a patch was made from another base.
    CorruptFileError
        If a patch's hashes do not match its content, or a file is damaged.
    MachineError
        If something cannot be read or written; ``base`` is as it was.
    """
    several = [patches] if isinstance(patches, (Patch, str, os.PathLike)) else patches
    loaded = [_load(patch) for patch in several]
    operate(
        plan_apply(base, loaded, out=out, in_place=in_place, force=force, threads=threads, progress=progress),
        threads=threads,
        progress=progress,
    )


@boundary
def revert(
    checkpoint: _Out,
    patch: Patch | _Out,
    *,
    out: _Out | None = None,
    in_place: bool = False,
    base: _Out | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> None:
    """Take a patch out again: the replaced vectors come back, bit for bit.

    Parameters
    ----------
    checkpoint:
        A checkpoint that is patched, or partly.
    patch:
        The patch; if it is not reversible, ``base`` must be given.
    base:
        The checkpoint the patch was made from.
    out, in_place, force:
        As in `apply`.

    Raises
    ------
    UsageError, MismatchError, CorruptFileError, MachineError
        As `apply`; a `UsageError` also if the replaced values are neither in the patch nor in ``base``.
    """
    operate(
        plan_revert(
            checkpoint,
            _load(patch),
            base=base,
            out=out,
            in_place=in_place,
            force=force,
            threads=threads,
            progress=progress,
        ),
        threads=threads,
        progress=progress,
    )


def _load(patch: Patch | _Out) -> Patch:
    return patch if isinstance(patch, Patch) else Patch.load(patch)


def plan_apply(
    base: _Out,
    patches: Sequence[Patch],
    *,
    out: _Out | None,
    in_place: bool,
    force: bool,
    threads: int | None,
    progress: Progress,
) -> Surgery:
    """Check everything that `apply` needs; nothing is written."""
    if not patches:
        raise UsageError("there is no patch to apply")
    rows = [Rows(patch, patch.values) for patch in patches]
    return _plan(base, rows, "patched", out, in_place, force, threads, progress)


def plan_revert(
    checkpoint: _Out,
    patch: Patch,
    *,
    base: _Out | None,
    out: _Out | None,
    in_place: bool,
    force: bool,
    threads: int | None,
    progress: Progress,
) -> Surgery:
    """Check everything that `revert` needs; nothing is written."""
    inputs = []
    if base is not None:
        original = open_checkpoint(base)
        check_fit(original, patch)
        inputs.append(original.source.path)
        read = _BaseRows(patch, original).read
    elif patch.reversible:
        read = patch.base_values
    else:
        raise UsageError(
            "the patch does not hold the values it replaced",
            file=patch.path,
            hint="name the checkpoint it was made from with --base (or make patches with --reversible)",
        )
    return _plan(checkpoint, [Rows(patch, read)], "base", out, in_place, force, threads, progress, inputs)


class _BaseRows:
    """The replaced vectors, from the base checkpoint; each is checked against its digest."""

    def __init__(self, patch: Patch, base: Checkpoint) -> None:
        self._patch, self._base = patch, base

    def read(self, name: str, start: int, stop: int) -> Raw:
        """As `Patch.base_values`."""
        tensor = self._patch.tensors[name]
        rows = gather(self._base, tensor.info, tensor.layout, self._patch.index(name)[start:stop])
        if not np.array_equal(digests(rows), self._patch.base_digests(name, start, stop)):
            raise MismatchError(
                "this is not the base that the patch was made from",
                file=self._base.name,
                tensor=name,
                hint="name the right one with --base",
            )
        return rows


def _plan(
    named: _Out,
    rows: Sequence[Rows],
    goal: str,
    out: _Out | None,
    in_place: bool,
    force: bool,
    threads: int | None,
    progress: Progress,
    inputs: Sequence[Path] = (),
) -> Surgery:
    if (out is None) == (not in_place):
        raise UsageError("say where the result goes: -o OUT, or --in-place")
    checkpoint = open_checkpoint(named)
    patches = [r.patch for r in rows]
    for patch in patches:
        check_fit(checkpoint, patch)
    files = None
    if out is not None:
        kind = "file" if checkpoint.is_file else "directory"
        sources = [checkpoint.source.path, *inputs, *(p.path for p in patches if p.path is not None)]
        refuse_output(out, inputs=sources, force=force, kind=kind)  # type: ignore[arg-type]
        files = None if checkpoint.is_file else folder_files(checkpoint)
    result = Surgery(checkpoint, rows, (), None if out is None else Path(out), force, files, needed=True)
    if in_place:
        _refuse_in_place(result)
    with result.timing.clock():
        _check_states(result, goal, threads, progress)
    return result


def _check_states(plan: Surgery, goal: str, threads: int | None, progress: Progress) -> None:
    patches = [rows.patch for rows in plan.rows]
    total = sum(patch.value_bytes for patch in patches)
    with progress("checking", total) as advance:
        plan.states = examine(plan.checkpoint, patches, threads=threads, progress=advance)
    for patch, state in zip(patches, plan.states, strict=True):
        for name, tensor in state.tensors.items():
            if tensor.neither:
                raise MismatchError(
                    f"{patch.name} was made from another base",
                    file=plan.checkpoint.name,
                    tensor=name,
                    expected="the vectors of its base, or its own",
                    found=f"{tensor.neither} of {patch.tensors[name].count} that are neither",
                    hint="nothing was written; see `neftsurgery verify` for every tensor",
                )
    final = [state.state for state in plan.states]
    plan.needed = not all(state == goal or _all_equal(s) for state, s in zip(final, plan.states, strict=True))


def _all_equal(state: PatchState) -> bool:
    return not any(tensor.base or tensor.patched for tensor in state.tensors.values())


def _refuse_in_place(plan: Surgery) -> None:
    source = plan.checkpoint.source
    if source.repo is not None:
        raise UsageError(
            "a Hub model cannot be changed in place: its files belong to the cache",
            file=source.named,
            hint="write a new checkpoint with -o OUT",
        )
    for path in {source.path, *(shard.path for shard in plan.touched)}:
        if path.is_symlink():
            raise UsageError(
                "a symlink cannot be changed in place: what it points to may be shared",
                file=path,
                hint="write a new checkpoint with -o OUT, or name the real file",
            )
        if path.is_file() and path.stat().st_nlink > 1:
            raise UsageError(
                "a file with several hard links cannot be changed in place: all of them would change",
                file=path,
                hint="write a new checkpoint with -o OUT",
            )


def operate(plan: Surgery, *, threads: int | None = None, progress: Progress = silent) -> None:
    """Carry out a planned apply or revert."""
    with plan.timing.clock():
        if plan.out is not None:
            _write_copy(plan, plan.out, threads, progress)
        elif plan.needed:
            _write_in_place(plan, progress)
    plan.timing.bytes_read = plan.checkpoint.bytes_read + sum(r.patch.value_bytes for r in plan.rows)


def _write_copy(plan: Surgery, out: Path, threads: int | None, progress: Progress) -> None:
    checkpoint = plan.checkpoint
    along = () if plan.files is None else plan.files.along
    sizes = [shard.size for shard in checkpoint.shards]
    sizes += [(checkpoint.root / path).stat().st_size for path in along]
    parent = out.absolute().parent
    with progress("copying", sum(sizes)) as advance:
        if checkpoint.is_file:
            with staged_file(out, force=plan.force) as staged:
                require_space(parent, sum(sizes))
                _write_shard(plan, checkpoint.shards[0], staged.fd, advance)
                checkpoint.check_unchanged()
            return
        with staged_directory(out, force=plan.force) as folder:
            require_space(parent, sum(sizes))

            def write(shard: Shard) -> None:
                fd = os.open(
                    folder / shard.path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
                try:
                    _write_shard(plan, shard, fd, advance)
                finally:
                    os.close(fd)

            for _ in in_order(write, checkpoint.shards, threads):
                pass
            for path in along:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                copy_file(checkpoint.root / path, folder / path, progress=advance)
            checkpoint.check_unchanged()


def _write_shard(plan: Surgery, shard: Shard, fd: int, advance: Callable[[int], None]) -> None:
    """Copy a weight file to the empty file ``fd`` and write the rows that lie in it."""
    mode = copy_file(shard.path, fd, progress=advance)
    _write_rows(plan, {shard.path: fd})
    os.fchmod(fd, mode)


def _write_rows(plan: Surgery, files: Mapping[Path, int]) -> None:
    """Write all rows that lie in ``files``, patch by patch."""
    for rows in plan.rows:
        for name, tensor in rows.patch.tensors.items():
            shard = plan.checkpoint.shard_of(name)
            if shard.path not in files:
                continue
            fd, offset, index = files[shard.path], shard.header.offsets[name], rows.patch.index(name)
            for start, stop in tensor.blocks():
                vectors = rows.read(name, start, stop)
                scatter(fd, offset, tensor.info, tensor.layout, index[start:stop], vectors, str(shard.path))


def _write_in_place(plan: Surgery, progress: Progress) -> None:
    checkpoint = plan.checkpoint
    changes = [
        Change(tensor.info, tensor.layout, rows.patch.index(name), _digests(rows, name))
        for rows in plan.rows
        for name, tensor in rows.patch.tensors.items()
    ]
    try:
        with progress("writing in place", 1) as advance, locked(plan.touched) as held:
            checkpoint.check_unchanged()  # since it was examined, which needed no lock
            with journaled(checkpoint, changes):
                _write_rows(plan, held)
                for fd in held.values():
                    os.fsync(fd)
            advance(1)
    except BaseException:
        # The journal, if it was begun, is still there: undo at once what can be undone at once.
        with suppress(NeftError, OSError):
            heal(checkpoint.source)
        raise


def _digests(rows: Rows, name: str) -> Raw:
    blocks = [digests(rows.read(name, start, stop)) for start, stop in rows.patch.tensors[name].blocks()]
    return np.concatenate(blocks) if blocks else np.empty((0, 16), np.uint8)
