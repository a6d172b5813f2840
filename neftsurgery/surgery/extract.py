"""extract: score, choose and cut out; the chosen rows of the tuned checkpoint become a patch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dequantized import require_stored_alike, stored_side
from ..checkpoint.folder_files import file_notes, not_compared
from ..checkpoint.name_prefixes import Prefixes
from ..checkpoint.provenance import Provenance, require_same_files, same_files, same_tensor
from ..checkpoint.ties import Joined, join, with_tied_names
from ..errors import UsageError, boundary
from ..neurons.vectors import block_memory, gather
from ..options import (
    CutOptions,
    ExtractOptions,
    LosslessOptions,
    OutputOptions,
    PrefixOptions,
    RunAnywhereOptions,
    Scope,
    ScopeOptions,
    ScoreOptions,
    SelectOptions,
    split,
)
from ..patch.lossless import LosslessPatch
from ..patch.patch import Manifest, Patch
from ..patch.patch_file import digests
from ..patch.write import NewPatch
from ..progress import Progress, Stopwatch, Timing, silent
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import RowBlock, Selection, SelectionFacts
from ..storage.output_checks import AnyPath, refuse_output
from ..storage.threads import Limits
from ..tensors.arrays import RawBytes
from ..text import size
from .diff import DiffPlan, check_score
from .lossless import CodingAndRun, LosslessPlan, plan_lossless
from .pairing import open_sides, pair
from .quantized_rows import stored_rows
from .verb import running, warn


@dataclass(frozen=True)
class ExtractPlan:
    """The neurons are chosen, none is cut out yet. Made by `plan_extract`, which scores first if need be."""

    base: Checkpoint
    joined: Joined  # with the tuned model
    selection: Selection  # the chosen neurons, with those that must come along
    new: NewPatch  # of the rows that the files hold
    captured_known: bool  # whether the selection's captured share is about these checkpoints
    scores: Scores | None = None  # None: the selection was given
    out: Path | None = None  # None: a temporary file
    force: bool = False
    warnings: Sequence[str] = ()
    timing: Timing = field(default_factory=Timing)  # of choosing
    # By another run: fingerprints, which skip most bytes, say that nothing changed.
    scored_before: bool = False

    @property
    def parameters(self) -> int:
        """Parameters of the model; a tied tensor counts once."""
        return self.base.parameters if self.scores is None else self.scores.parameters

    @property
    def nbytes(self) -> int:
        """Bytes of the patch file."""
        return self.new.nbytes

    @property
    def facts(self) -> SelectionFacts:
        """What the manifest says of the selection; captured shares only if they are of these checkpoints."""
        return self.new.manifest.selection

    @cached_property
    def remainder(self) -> Remainder | None:
        """What base plus patch lacks of the tuned model; None if only a selection is known, and no lack."""
        base, joined, chosen, scores = self.base, self.joined, self.selection.tensors, self.scores
        left, unknown = {*joined.only_base, *joined.only_tuned}, not_compared(base, joined.tuned)
        if scores is None or not self.captured_known:
            return Remainder([*joined.only_base, *joined.only_tuned], unknown) if left else None
        unknown += ["changes since the scores were made"] if self.scored_before else []
        unknown += ["codes that stand for the same numbers"] if base.quantized else []
        for name, info in base.tensors.items():
            if name in left or name in joined.copies or info.name != name:
                continue
            entry = scores.unscored.get(name)
            changed = scores.sums(name, "changed") if name in scores.tensors or name in chosen else None
            if not same_tensor(info, joined.tuned.tensors.get(name)):
                left.add(name)
            elif changed is not None:
                kept = np.delete(changed, chosen[name].index) if name in chosen else changed
                left |= {name} if kept.any() else set()
            elif entry is None:
                unknown.append(name)
            elif entry.changed:
                left.add(name)
        return Remainder(sorted(left), unknown)

    def describe(self) -> dict[str, object]:
        """For ``--dry-run`` and JSON."""
        return {
            "base": self.base.name,
            "tuned": self.joined.tuned.name,
            "neurons": (self.selection if self.scores is None else self.scores).neurons,
            **self.selection.describe(),
            "parameters": self.parameters,
            "captured": self.facts.captured,
            "captured_scored": self.facts.captured_scored,
            "whole_change": None if self.remainder is None else self.remainder.is_whole,
            "left_out": [] if self.remainder is None else list(self.remainder.left),
            "not_compared": [] if self.remainder is None else list(self.remainder.not_compared),
            "reversible": self.new.reversible,
            "bytes": self.nbytes,
            "out": None if self.out is None else str(self.out),
            "warnings": list(self.warnings),
        }

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Patch:
        """Cut the chosen neurons out, and write the patch."""
        limits, chosen = limits or Limits.of(), self.new.selection
        sides = [stored_side(side) for side in (self.base, self.joined.tuned)]

        def rows(block: RowBlock) -> tuple[RawBytes, RawBytes, RawBytes]:
            part = chosen.tensors[block.name]
            index = part.index[block.start : block.stop]
            old, new = (gather(side, part.info, part.layout, index, block=limits.block) for side in sides)
            return new, old, digests(old)

        workers = limits.workers(block_memory((part.layout for part in chosen), limits.block))
        with (
            Stopwatch(*sides) as watch,
            self.new.written(self.out, force=self.force) as writer,
            progress("cutting out", 2 * chosen.nbytes) as advance,
        ):
            writer.write_blocks(rows, workers, limits.block, lambda done: advance(2 * done))
            for side in sides:
                side.check_unchanged()
        writer.patch.timing = self.timing + watch.timing
        return writer.patch


class AnyExtractOptions(ExtractOptions, RunAnywhereOptions):
    """The keywords of `extract` of either kind."""


@overload
def extract(
    base: AnyPath | Mapping[str, Any],
    tuned: AnyPath | Mapping[str, Any],
    *,
    lossless: Literal[True],
    **options: Unpack[CodingAndRun],
) -> LosslessPatch: ...


@overload
def extract(
    base: AnyPath,
    tuned: AnyPath,
    selection: Selection | None = None,
    *,
    scores: Scores | None = None,
    reversible: bool = False,
    **options: Unpack[CutOptions],
) -> Patch: ...


@boundary
def extract(
    base: AnyPath | Mapping[str, Any],
    tuned: AnyPath | Mapping[str, Any],
    selection: Selection | None = None,
    *,
    scores: Scores | None = None,
    reversible: bool = False,
    **options: Unpack[AnyExtractOptions],
) -> Patch | LosslessPatch:
    """Cut the chosen neurons of a tuned checkpoint out as a patch on its base.

    Args:
        base, tuned: Checkpoints: a file, a folder, or a Hub id; ``tuned`` may be a PEFT LoRA adapter of the
            base, and counts as merged into it. With ``lossless`` also mappings of names to tensors, of numpy
            or torch.
        selection: The neurons to cut out. None: choose them by ``scores`` and a budget.
        scores: Scores of these checkpoints. None: score them first, by ``anatomy``, ``score``, ``rank``,
            ``axis``, ``include``, ``exclude`` and ``only`` as in `neftsurgery.diff`.
        lossless: Keep the whole fine-tune instead of chosen neurons: every tensor, and the files beside the
            weights that belong to a model. Nothing is chosen then.
        fast, weights_only: For ``lossless``: forms that are decoded about as fast as memory is copied; no
            files beside the weights.
        reversible: Keep the replaced values in the patch, so that it can be reverted without the base.
        out: Where to write the patch. None: it lives in a temporary file until saved.
        neurons, params, threshold, changed, like, per, max_per_tensor, policy, seed, with_bias: The budget,
            as in `Scores.select`: ``neurons="3%"`` and so on.
        strip_prefix, add_prefix, force, threads, memory, executor, progress: As in `diff`. An executor's
            processes score; this one cuts out.

    Raises:
        UsageError, CorruptFileError, MachineError: As `diff`.
        MismatchError: If the checkpoints do not fit each other or the selection.
    """
    run, kept = split("extract", options, RunAnywhereOptions, ExtractOptions)
    machine = running(run)
    plan = plan_extract(base, tuned, selection, scores=scores, reversible=reversible, **machine, **kept)
    warn(__name__, plan.warnings)
    return plan.run(**machine)


def plan_extract(
    base: AnyPath | Mapping[str, Any],
    tuned: AnyPath | Mapping[str, Any],
    selection: Selection | AnyPath | None = None,
    *,
    scores: Scores | AnyPath | None = None,
    reversible: bool = False,
    inputs: Sequence[AnyPath] = (),
    limits: Limits | None = None,
    progress: Progress = silent,
    **options: Unpack[ExtractOptions],
) -> ExtractPlan | LosslessPlan:
    """Choose the neurons, scoring first if need be; ``inputs``: files that ``out`` must not replace."""
    groups = (LosslessOptions, OutputOptions, PrefixOptions, ScopeOptions, ScoreOptions, SelectOptions)
    coding, output, prefix, scope, scoring, budget = split("extract", options, *groups)
    by = {name: one for name, one in (("scores", scores), ("selection", selection)) if one is not None}
    if coding.pop("lossless", False):
        others = (*by, *prefix, *scope, *scoring, *budget)
        _refuse("lossless", others, "a lossless patch keeps every neuron")
        return plan_lossless(base, tuned, reversible=reversible, **output, **coding)
    for name in (name for name, wanted in coding.items() if wanted):
        raise UsageError(f"[[{name}]] is for [[lossless]] patches only")
    if isinstance(base, Mapping) or isinstance(tuned, Mapping):
        raise UsageError("tensors in memory are taken with [[lossless=True]] only")
    if len(by) > 1:
        raise UsageError("[[scores]] and [[selection]] do not go together")
    for name in by:
        _refuse(name, (*scope, *scoring), "it is for scoring, which was done before")
    for name in budget if selection is not None else ():
        _refuse(name, ["selection"], "give one or the other")
    checked = None if selection is not None else Budget.of(**budget)
    score, rank = scoring.get("score", "cosine"), scoring.get("rank", 32)
    check_score(score, rank)
    files = [one for one in by.values() if isinstance(one, str | os.PathLike)]
    scores = Scores.load(scores) if isinstance(scores, str | os.PathLike) else scores
    selection = Selection.load(selection) if isinstance(selection, str | os.PathLike) else selection
    first, second = open_sides(base, tuned, Prefixes.of(**prefix))
    inputs = [first.source.path, second.source.path, *files, *inputs]
    force = output.get("force", False)
    place = refuse_output(output.get("out"), inputs=inputs, force=force, kind="file")
    given, warnings, timing = scores, list[str](), Timing()
    if checked is not None and scores is None:
        comparison = DiffPlan(pair(first, second, Scope(**scope)), score, checked.seed, rank=rank)
        joined, warnings = comparison.pair.joined, [*comparison.warnings]
        scores = comparison.run(limits=limits, progress=progress)
        timing = scores.timing
    else:
        joined = join(first, second)
        warnings += [*joined.notes, *file_notes(first), *file_notes(second)]
    with Stopwatch() as watch:
        if given is None and scores is not None:
            origin, result = scores.base, scores.tuned
        else:
            origin, result = Provenance.of(first), Provenance.of(second)
        if given is not None:
            hint = "score these checkpoints, or name those that were scored"
            what = "the scores are of another"
            require_same_files(f"{what} base", given.base, origin, file=first.name, hint=hint)
            require_same_files(f"{what} tuned", given.tuned, result, file=second.name, hint=hint)
        if checked is not None and scores is not None:
            selection = scores.choose(checked)
            warnings += checked.warnings(scores.units or scores.neurons)
    if scores is not None and scores.nonfinite:
        warnings.append(f"{scores.nonfinite} neurons hold a NaN or Inf, and are never chosen by score")
    assert selection is not None  # given, or chosen just now
    selection = _with_ties(selection, joined)
    first = with_tied_names(first, [chosen.info for chosen in selection])
    require_stored_alike(first, joined.tuned, selection.tensors)
    selection.require_fit(first, joined.tuned)
    rows = stored_rows(selection, first, joined.tuned)
    if rows.notes and scores is not None:
        rows = rows.with_facts(scores.captured(rows.selection.tensors))
    warnings += rows.notes
    if same_files(selection.facts.base, origin) is False:
        warnings.append(f"the selection was made on another base than {first.name}")
    known = same_files(selection.facts.tuned, result) is True
    manifest = Manifest.of(origin, rows.stored.facts.for_patch(captured=known))
    new = NewPatch(rows.stored, manifest, reversible, rows.groups)
    if new.nbytes > first.nbytes:
        sizes = f"({size(new.nbytes)} and {size(first.nbytes)})"
        advice = "[[reversible]] doubles it" if reversible else "[[neurons=3%]] would make a small one"
        warnings.append(f"the patch is larger than the base {sizes}: {advice}")
    timing += watch.timing
    return ExtractPlan(
        first, joined, rows.selection, new, known, scores, place, force, warnings, timing, given is not None
    )


def _refuse(given: str, others: Sequence[str], why: str) -> None:
    """Raise a `UsageError` if there are options that do not go with one that was given."""
    if others:
        raise UsageError(f"[[{others[0]}]] does not go with [[{given}]]", hint=why)


def _with_ties(selection: Selection, joined: Joined) -> Selection:
    """The selection; what it says of a copy of a tied tensor is of the tensor.

    Of two that only the base ties, both are in it if one is: `apply` writes what a patch says of one of two
    tied tensors to both, unless it says something of both.
    """
    tensors = dict(selection.tensors)
    for copy, name in joined.copies.items():
        if (chosen := tensors.pop(copy, None)) is not None:
            index = np.union1d(chosen.index, tensors[name].index) if name in tensors else chosen.index
            tensors[name] = replace(chosen, info=replace(chosen.info, name=name), index=index)
    for names in joined.untied.items():
        for name, other in (names, names[::-1]):
            if name not in tensors and other in tensors:
                chosen = tensors[other]
                tensors[name] = replace(chosen, info=replace(chosen.info, name=name))
    return Selection(dict(sorted(tensors.items())), selection.facts)


@dataclass(frozen=True, slots=True)
class Remainder:
    """What base plus patch may lack of the tuned model."""

    left: Sequence[str]  # tensors that differ from it
    not_compared: Sequence[str]  # files, and tensors, of which nothing is known

    @property
    def is_whole(self) -> bool | None:
        """Whether base plus patch is the tuned model bit for bit; None if nothing says that it is not."""
        return False if self.left else None if self.not_compared else True
