"""extract: score, choose and cut out; the chosen rows of the tuned checkpoint become a patch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint.adapter import open_pair
from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..neurons.anatomy import AxisOption
from ..neurons.vectors import block_memory, blocks, gather
from ..patch.patch import Patch, Raw
from ..patch.write import written_patch
from ..progress import Progress, Timing, silent
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..storage.output_checks import refuse_output
from ..storage.threads import Limits, in_order
from ..version import __version__
from .diff import check_score, describe_side, score_pair
from .pairing import Scope, pair

__all__ = ["Extraction", "cut", "extract", "is_whole_change", "plan_extraction"]

log = logging.getLogger(__name__)


@dataclass
class Extraction:
    """A planned extraction: the neurons are chosen, none is cut yet.

    Attributes
    ----------
    base, tuned:
        The checkpoints.
    selection:
        The neurons to cut out.
    base_facts:
        What the manifest says of the base.
    captured_known:
        Whether the selection's captured share is about these checkpoints.
    scores:
        What they were chosen by, if they were scored here or in a file.
    timing:
        What it took so far.
    warnings:
        Sentences for the user.
    """

    base: Checkpoint
    tuned: Checkpoint
    selection: Selection
    base_facts: dict[str, Any]
    captured_known: bool
    scores: Scores | None = None
    timing: Timing = field(default_factory=Timing)
    warnings: Sequence[str] = ()


@boundary
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    selection: Selection | None = None,
    *,
    scores: Scores | None = None,
    anatomy: str = "rows",
    score: str = "cosine",
    axis: AxisOption = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    reversible: bool = False,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress = silent,
    **budget: Any,
) -> Patch:
    """Cut the chosen neurons of a tuned checkpoint out as a patch on its base.

    Parameters
    ----------
    base, tuned:
        Checkpoints: a file, a folder, or a Hub id; ``tuned`` may be a PEFT LoRA adapter of the base, and
        counts as merged into it.
    selection:
        The neurons to cut out. None: choose them by ``scores`` and ``budget``.
    scores:
        Scores of these checkpoints. None: score them first, by ``anatomy``, ``score``, ``axis``,
        ``include``, ``exclude`` and ``only`` as in `neftsurgery.diff`.
    reversible:
        Keep the replaced values in the patch, so that it can be reverted without the base.
    threads, memory:
        As in `diff`.
    out:
        Where to write the patch. None: it lives in a temporary file until saved.
    **budget:
        As `Scores.select`: ``neurons="3%"`` and so on.

    Raises
    ------
    UsageError
        For a path or option that makes no sense, or an ``out`` that exists.
    MismatchError
        If the checkpoints do not fit each other or the selection.
    CorruptFileError
        If a file is damaged.
    MachineError
        If something cannot be read or written.
    """
    limits = Limits.of(threads, memory)
    plan = plan_extraction(
        base,
        tuned,
        selection,
        scores=scores,
        scope=Scope(anatomy, axis, include, exclude, only),
        score=score,
        budget=budget,
        out=out,
        force=force,
        limits=limits,
        progress=progress,
    )
    for warning in plan.warnings:
        log.warning("%s", warning)
    return cut(plan, reversible=reversible, out=out, force=force, limits=limits, progress=progress)


def plan_extraction(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    selection: Selection | None,
    *,
    scores: Scores | None,
    scope: Scope,
    score: str,
    budget: dict[str, Any],
    out: str | os.PathLike[str] | None,
    force: bool,
    limits: Limits,
    progress: Progress,
) -> Extraction:
    """Choose the neurons, scoring the checkpoints first if need be."""
    if selection is not None and (budget or scores is not None):
        raise UsageError("a selection does not go with scores or a budget", hint="give one or the other")
    checked = None if selection is not None else _budget(budget)
    check_score(score)
    first, second = open_pair(base, tuned)
    if out is not None:
        refuse_output(out, inputs=[first.source.path, second.source.path], force=force, kind="file")
    timing = Timing()
    given, warnings = scores, list[str]()
    if selection is None and scores is None:
        plan = pair(first, second, scope)
        warnings += plan.anatomy.warnings
        seed = int(budget.get("seed", 0))
        scores = score_pair(plan, score, seed=seed, limits=limits, progress=progress, timing=timing)
    with timing.clock():
        if given is None and scores is not None:
            here = {"base": scores.facts["base"], "tuned": scores.facts["tuned"]}
        else:
            here = {"base": describe_side(first), "tuned": describe_side(second)}
        if given is not None:
            _require_scored_here(given, "base", first, here["base"])
            _require_scored_here(given, "tuned", second, here["tuned"])
        if checked is not None and scores is not None:
            selection = scores.choose(checked)
    if scores is not None and (count := scores.facts.get("nonfinite")):
        warnings.append(f"{count} neurons hold a NaN or Inf, and are never chosen by score")
    assert selection is not None  # given, or chosen just now
    check_selection(selection, first, second)
    if _same_files(selection.facts, "base", here["base"]) is False:
        warnings.append(f"the selection was made on another base than {first.name}")
    known = _same_files(selection.facts, "tuned", here["tuned"]) is True
    return Extraction(first, second, selection, here["base"], known, scores, timing, warnings)


def _budget(options: dict[str, Any]) -> Budget:
    like = options.get("like")
    return Budget.of(**(options | {"like": like.counts} if isinstance(like, Selection) else options))


def check_selection(selection: Selection, *sides: Checkpoint) -> None:
    """Raise a `MismatchError` unless every tensor of the selection is in all ``sides``, as it says."""
    if not selection.tensors:
        raise MismatchError("no neuron is chosen", hint="the two may be equal, or the threshold too high")
    for checkpoint in sides:
        for name, chosen in selection.tensors.items():
            found = checkpoint.tensors.get(name)
            if found is None or (found.dtype, found.shape) != (chosen.info.dtype, chosen.info.shape):
                raise MismatchError(
                    "the selection is not for this checkpoint",
                    file=checkpoint.name,
                    tensor=name,
                    expected=chosen.info.describe(),
                    found=found.describe() if found else "no such tensor",
                )


def cut(
    plan: Extraction,
    *,
    reversible: bool = False,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    limits: Limits,
    progress: Progress = silent,
) -> Patch:
    """Carry out a planned extraction."""
    before = plan.base.bytes_read + plan.tuned.bytes_read
    with plan.timing.clock():
        facts = _facts(plan)
        with written_patch(plan.selection, facts, out, reversible=reversible, force=force) as written:
            writer = written.writer

            def copy(block: _Block) -> tuple[Raw, Raw]:
                chosen = plan.selection.tensors[block.name]
                index = chosen.index[block.start : block.stop]
                rows = [gather(side, chosen.info, chosen.layout, index) for side in (plan.base, plan.tuned)]
                return writer.write_rows(block.name, block.start, rows[0], rows[1])

            total = 2 * sum(len(c.index) * c.layout.width * c.info.type.itemsize for c in plan.selection)
            workers = limits.workers(block_memory(chosen.layout for chosen in plan.selection))
            with progress("cutting out", total) as advance:
                for block, (old, new) in in_order(copy, _blocks(plan.selection), workers):
                    writer.add_digests(block.name, old, new)
                    advance(2 * block.nbytes)
            for side in (plan.base, plan.tuned):
                side.check_unchanged()
        patch = written.result()
    plan.timing.bytes_read += plan.base.bytes_read + plan.tuned.bytes_read - before
    return patch


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    start: int
    stop: int
    nbytes: int


def _blocks(selection: Selection) -> Iterator[_Block]:
    for name, chosen in selection.tensors.items():
        size = chosen.layout.width * chosen.info.type.itemsize
        for start, stop in blocks(chosen.info, chosen.layout, len(chosen.index)):
            yield _Block(name, start, stop, (stop - start) * size)


def _facts(plan: Extraction) -> dict[str, Any]:
    """The manifest's ``base``, ``selection`` and ``created_by``."""
    facts = {key: value for key, value in plan.selection.facts.items() if key not in ("base", "tuned")}
    if not plan.captured_known:
        facts = {key: value for key, value in facts.items() if not key.startswith("captured")}
    return {"base": plan.base_facts, "selection": facts, "created_by": f"neftsurgery {__version__}"}


def is_whole_change(plan: Extraction) -> bool | None:
    """Whether base plus patch is the tuned model bit for bit; None if only a selection is known."""
    scores, chosen = plan.scores, plan.selection.tensors
    if scores is None or not plan.captured_known:
        return None
    if any(scores.facts.get(key) for key in ("only_in_base", "only_in_tuned", "differing")):
        return False
    for name in scores.tensors:
        changed = scores.sums(name, "changed")
        if changed is None:
            return None
        if changed.any() and (name not in chosen or np.delete(changed, chosen[name].index).any()):
            return False
    for name, entry in scores.facts.get("unscored", {}).items():
        changed = scores.sums(name, "changed") if name in chosen else None
        left = entry.get("changed", 0) if changed is None else np.delete(changed, chosen[name].index).sum()
        if left:
            return False
    return True


def _same_files(facts: Mapping[str, Any], side: str, here: Mapping[str, Any]) -> bool | None:
    """Whether scores or a selection were made on this side's files; None if they do not say."""
    there = facts.get(side)
    fingerprint = there.get("fingerprint") if isinstance(there, dict) else None
    return None if fingerprint is None else bool(fingerprint == here["fingerprint"])


def _require_scored_here(scores: Scores, side: str, checkpoint: Checkpoint, here: Mapping[str, Any]) -> None:
    if _same_files(scores.facts, side, here) is False:
        raise MismatchError(
            f"the scores are of another {side}",
            file=checkpoint.name,
            expected=f"fingerprint {scores.facts[side]['fingerprint']}",
            found=here["fingerprint"],
            hint="score these checkpoints, or name those that were scored",
        )
