"""apply and revert: write the vectors of patches, or those they replaced, after checking everything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import FolderFiles, file_notes, folder_files
from ..checkpoint.healing import heal_recorded
from ..checkpoint.journal import require_writable
from ..checkpoint.ties import stored_ties
from ..errors import MismatchError, UsageError, boundary
from ..options import RunOptions
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.overlap import RowSource
from ..patch.patch import Patch
from ..progress import Progress, Stopwatch, silent
from ..sources.resolve import Source
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits
from .chains import opened_patches
from .merge_checks import require_units_in_turn
from .rebuild import RebuildPlan, plan_rebuild
from .rewrite import RewritePlan, RewriteResult, WriteOptions, require_place, rows_by_file
from .verb import named_base, other_base, replaced_rows, require_replaced, run_keywords, warn
from .verify import JOURNAL_HINT, PatchState, examine


@boundary
def apply(
    base: AnyPath,
    patches: AnyPatch | Sequence[AnyPatch],
    *,
    to: int | None = None,
    out: AnyPath | None = None,
    in_place: bool = False,
    sha256: str | Sequence[str] | None = None,
    force: bool = False,
    **options: Unpack[RunOptions],
) -> RewriteResult:
    """Write a patched checkpoint.

    Args:
        base: A checkpoint: a file, a folder, or a Hub id. It may be patched already, or partly.
        patches: A patch, or several, each a `Patch` or a path; each is checked against the state that the
            ones before it leave. Lossless patches make a whole checkpoint, and follow each other; a folder
            stands for its patches, in their order.
        to: Of a folder of lossless patches, the number of the last one: that in its file name.
        out: The new checkpoint: a file for a file, else a folder. It appears whole or not at all.
        in_place: Change ``base`` itself: only what differs is written, the old bytes journaled first. A
            lossless patch needs a base whose weight files have the headers that those of the result have.
        sha256: The SHA-256 that the patch's file must have; of several patches, one each, in order.
        force: Replace ``out`` if it exists. Also write where only fingerprints tell models apart, and they
            differ.
        threads, memory, progress: As in `diff`.

    Raises:
        UsageError: If ``out`` exists or makes no sense, or ``base`` cannot be changed in place.
        MismatchError: If a patch was made from another base. Without ``force``, also if nothing shows that it
            was not.
        CorruptFileError: If a patch's hashes do not match its content, or its file not ``sha256``, or a file
            is damaged.
        MachineError: If something cannot be read or written; ``base`` is as it was. Also if an earlier change
            in place of ``base`` was interrupted, and this user's commands did not make it: see `heal`.
    """
    run = run_keywords("apply", options)
    if in_place:
        undo_unfinished(base)
    plan = plan_apply(base, patches, to=to, sha256=sha256, out=out, in_place=in_place, force=force, **run)
    warn(__name__, plan.warnings)
    return plan.run(**run)


@boundary
def revert(
    checkpoint: AnyPath,
    patch: AnyPatch,
    *,
    out: AnyPath | None = None,
    in_place: bool = False,
    base: AnyPath | None = None,
    force: bool = False,
    **options: Unpack[RunOptions],
) -> RewriteResult:
    """Undo a patch: write the vectors it replaced back, bit for bit.

    Args:
        checkpoint: A checkpoint that is patched, or partly.
        patch: The patch. If it is not reversible, ``base`` must be given.
        base: The checkpoint the patch was made from.
        out, in_place, force, threads, memory, progress: As in `apply`.

    Raises:
        UsageError, MismatchError, CorruptFileError, MachineError: As `apply`. Also a `UsageError` if the
            patch lacks the replaced values and ``base`` is not given.
    """
    run = run_keywords("revert", options)
    if in_place:
        undo_unfinished(checkpoint)
    plan = plan_revert(checkpoint, patch, base=base, out=out, in_place=in_place, force=force, **run)
    warn(__name__, plan.warnings)
    return plan.run(**run)


def undo_unfinished(checkpoint: AnyPath) -> None:
    """Undo an interrupted change in place if this user's commands made it; else a `MachineError`."""
    if (healed := heal_recorded(checkpoint)) is not None:
        warn(__name__, [f"{healed.checkpoint}: a change in place was interrupted; it is undone"])


def plan_apply(
    base: AnyPath,
    patches: AnyPatch | Sequence[AnyPatch],
    *,
    to: int | None = None,
    sha256: str | Sequence[str] | None = None,
    **options: Unpack[WriteOptions],
) -> RewritePlan | RebuildPlan:
    """Check everything that `apply` needs; nothing is written."""
    single = (Patch, LosslessPatch, Source, str, os.PathLike)
    loaded = opened_patches([patches] if isinstance(patches, single) else patches, sha256, to)
    if not loaded:
        raise UsageError("there is no patch to apply")
    if lossless := [patch for patch in loaded if isinstance(patch, LosslessPatch)]:
        if len(lossless) < len(loaded):
            raise UsageError(
                "lossless patches and neuron patches are not applied together", file=lossless[0].place
            )
        return plan_rebuild(base, lossless, "patched", **options)
    rows = [RowSource(patch, patch.values) for patch in loaded if not isinstance(patch, LosslessPatch)]
    return _plan("patched", base, rows, (), (), **options)


def plan_revert(
    checkpoint: AnyPath,
    patch: AnyPatch,
    *,
    base: AnyPath | None = None,
    **options: Unpack[WriteOptions],
) -> RewritePlan | RebuildPlan:
    """Check everything that `revert` needs; nothing is written."""
    patch = load_any(patch)
    if isinstance(patch, LosslessPatch):
        return plan_rebuild(checkpoint, [patch], "base", base=base, **options)
    original, inputs = named_base(base, [patch])
    if original is None:
        require_replaced(patch, "revert")
    read = patch.base_values if original is None else partial(replaced_rows, patch, original)
    warnings = other_base(original, patch.base, patch.name)
    return _plan("base", checkpoint, [RowSource(patch, read)], inputs, warnings, **options)


def _plan(
    goal: str,
    named: AnyPath,
    rows: Sequence[RowSource],
    inputs: Sequence[Path],
    warnings: Sequence[str],
    *,
    out: AnyPath | None = None,
    in_place: bool = False,
    force: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> RewritePlan:
    require_place(named, out, in_place)
    checkpoint = Checkpoint.open(named)
    patches = [r.patch for r in rows]
    for patch in patches:
        checkpoint = patch.require_fit(checkpoint)
    require_units_in_turn(patches)
    rows, notes = _with_copies(checkpoint, rows)
    inputs = [checkpoint.source.path, *inputs, *(p.path for p in patches if p.path is not None)]
    place = refuse_output(out, inputs=inputs, force=force, kind="file" if checkpoint.is_file else "directory")
    if place is None:
        require_writable(checkpoint, [shard for shard, tensors in rows_by_file(checkpoint, rows) if tensors])
    files = FolderFiles() if place is None else folder_files(checkpoint)
    with Stopwatch() as watch, progress("checking", sum(p.value_bytes for p in patches)) as advance:
        replaced = rows if goal == "base" else None
        states = examine(
            checkpoint, patches, replaced=replaced, limits=limits or Limits.of(), advance=advance
        )
    for patch, state in zip(patches, states, strict=True):
        warnings = [*warnings, *_doubts(checkpoint, patch, state, goal, force)]
    watch.bytes_read = checkpoint.bytes_read + sum(patch.value_bytes for patch in patches)
    return RewritePlan(checkpoint, goal, rows, states, place, force, files, [*notes, *warnings], watch.timing)


def _doubts(checkpoint: Checkpoint, patch: Patch, state: PatchState, goal: str, force: bool) -> list[str]:
    """What speaks against a patch; refuses one that is not for this base, by its vectors or fingerprint."""
    for name, tensor in state.tensors.items():
        if tensor.neither:
            raise MismatchError(
                f"{patch.name} was made from another base",
                file=checkpoint.name,
                tensor=name,
                expected="the vectors of its base, or its own",
                found=f"{tensor.neither} of {patch.tensors[name].count} that are neither",
                hint=f"nothing was written; `neftsurgery verify` shows every tensor's state; {JOURNAL_HINT}",
            )
    done, other = state.is_done(goal), state.same_base is False
    if state.remark is None or (done and not other):
        return []
    if other and not (state.tells_models_apart or done or force):
        raise MismatchError(
            state.remark,
            file=checkpoint.name,
            expected=f"fingerprint {patch.base.fingerprint}",
            found="another",
            hint=f"nothing was written; name the checkpoint that {patch.name} is for, and "
            + ("in one command the" if goal == "patched" else "before it take out the later")
            + " patches that are on it already; [[force=True]] writes all the same",
        )
    return [f"{patch.name} on {checkpoint.name}: {state.remark}"]


def _with_copies(checkpoint: Checkpoint, rows: Sequence[RowSource]) -> tuple[list[RowSource], list[str]]:
    """The rows, written to the copies of tied tensors too that no patch changes itself; and notes."""
    homes = [{name: checkpoint.tensors[name].name for name in one.patch.tensors} for one in rows]
    ties, notes = stored_ties(checkpoint, (home for known in homes for home in known.values()))
    taken: dict[str, tuple[Patch, str]] = {}
    found = []
    for one, known in zip(rows, homes, strict=True):
        own = set(known.values())
        copies = {name: [c for c in ties.get(home, ()) if c not in own] for name, home in known.items()}
        found.append(replace(one, copies=copies))
        for name, home in known.items():
            for place in (home, *copies[name]):
                other, theirs = taken.setdefault(place, (one.patch, name))
                if theirs != name and not _agree(other, theirs, one.patch, name):
                    raise MismatchError(
                        f"{one.patch.name} changes {theirs} in another way, and the two are one tensor here",
                        file=checkpoint.name,
                        tensor=name,
                        hint="save the base with both, and with tie_word_embeddings false in config.json",
                    )
    return found, [*notes, *file_notes(checkpoint)]


def _agree(one: Patch, name: str, other: Patch, theirs: str) -> bool:
    """Whether two patches, or one, may change a tensor under two names: alike, or other neurons of it."""
    if one is not other:
        return not np.intersect1d(one.index(name), other.index(theirs)).size
    same = one.tensors[name].patched_hash == one.tensors[theirs].patched_hash
    return same and np.array_equal(one.index(name), one.index(theirs))
