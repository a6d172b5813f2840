"""``neftsurgery extract``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ...errors import UsageError
from ...options import (
    BudgetOptions,
    ChoosingOptions,
    LosslessOptions,
    PrefixOptions,
    ScopeOptions,
    ScoreOptions,
    SeedOptions,
    SpreadOptions,
    declared,
)
from ...progress import Timing
from ...scoring.scores import Scores
from ...selection.selection import Selection
from ...surgery.extract import ExtractPlan, plan_extract
from ...surgery.lossless import LosslessPlan, plan_lossless
from ...text import commas, percent, plural, size, some
from ..console import Console
from ..options import options_of, output_option, take, take_budget, writing_options


@click.command("extract")
@click.argument("base")
@click.argument("tuned")
@output_option("PATCH", required=True, text="Write the patch to this file.")
@options_of(BudgetOptions, LosslessOptions)
@click.option("--scores", metavar="SCORES", help="Choose by these scores instead of scoring again.")
@click.option("--selection", metavar="SELECTION", help="Take these neurons instead of choosing.")
@click.option(
    "--reversible",
    is_flag=True,
    help="Keep the replaced values too: revert then needs no base, and the patch is twice as large.",
)
@options_of(ScoreOptions, ScopeOptions, PrefixOptions, SeedOptions, SpreadOptions)
@writing_options
def command(
    console: Console,
    base: str,
    tuned: str,
    out: str,
    scores: str | None,
    selection: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Choose neurons of TUNED, and write them as a patch on BASE.

    The neurons are scored first, unless --scores or --selection is given. With --lossless nothing is chosen:
    the patch is the whole fine-tune, to the bit.

    \b
    Example:
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --neurons 3%
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --changed --include '*' --with-bias
      neftsurgery extract base/ tuned/ -o whole.safetensors --lossless
    """
    whole = take(options, LosslessOptions)
    if whole:
        _extract_whole(console, base, tuned, whole, dry_run, {**options, "out": out})
        return
    if scores is not None and selection is not None:
        raise UsageError("[[scores]] and [[selection]] do not go together")
    if scores is not None or selection is not None:
        _refuse(
            (*declared(ScoreOptions), *declared(ScopeOptions)),
            "scores" if scores is not None else "selection",
            "it is for scoring, which was done before",
        )
    choosing, inputs = take_budget(options, ChoosingOptions)
    inputs += [path for path in (scores, selection) if path is not None]
    if selection is not None:
        choosing.pop("seed", None)
    plan = plan_extract(
        base,
        tuned,
        None if selection is None else Selection.load(selection),
        scores=None if scores is None else Scores.load(scores),
        inputs=inputs,
        out=out,
        **choosing,
        **options,
        **console.running,
    )
    done = console.carry_out(plan, dry_run)
    _say(console, plan, done.nbytes, dry_run)
    console.answer(plan.describe() | {"bytes": done.nbytes}, done.timing, dry_run=dry_run)


def _extract_whole(
    console: Console, base: str, tuned: str, whole: dict[str, Any], dry_run: bool, options: dict[str, Any]
) -> None:
    """The command with --lossless."""
    if not whole.pop("lossless", False):
        raise UsageError(f"[[{next(iter(whole))}]] is for [[lossless]] patches only")
    chosen = sorted({"scores", "selection", *declared(ChoosingOptions)})
    _refuse(chosen, "lossless", "a lossless patch keeps every neuron")
    kept = {name: options[name] for name in ("out", "force", "reversible")}
    run_lossless(console, plan_lossless(base, tuned, **kept, **whole), dry_run)


def run_lossless(console: Console, plan: LosslessPlan, dry_run: bool) -> None:
    """Write a lossless patch, or say what would be written."""
    facts = plan.describe()
    if plan.tuned.not_carried:
        console.note(f"not carried: {', '.join(plan.tuned.not_carried)}")
    if dry_run:
        console.say(f"would write {plan.out}: {plural(len(plan.tuned.weights.tensors), 'tensor')}")
        console.answer(facts, Timing(), dry_run=True)
        return
    patch = plan.run(**console.running)
    share = percent(patch.nbytes / patch.forward.nbytes) if patch.forward.nbytes else "0%"
    console.say(f"wrote {plan.out} ({size(patch.nbytes)}, {share} of the tuned weights)")
    console.say("base plus patch is the tuned checkpoint, bit for bit")
    console.answer(facts | {"bytes": patch.nbytes, "forms": patch.forms()}, patch.timing, dry_run=False)


def _say(console: Console, plan: ExtractPlan, nbytes: int, dry_run: bool) -> None:
    chosen, total = plan.selection, plan.parameters
    console.say(
        f"{'would cut' if dry_run else 'cut'} {plural(chosen.neurons, 'neuron')} "
        f"of {plural(len(chosen.tensors), 'tensor')} out: {commas(chosen.parameters)} parameters, "
        f"{percent(chosen.parameters / total) if total else '0%'} of the model"
    )
    captured, scored = plan.facts.captured, plan.facts.captured_scored
    if captured is not None:
        of_scored = f" ({percent(scored)} of that of the scored tensors)" if scored is not None else ""
        console.say(f"it captures {percent(captured)} of the whole change{of_scored}")
    rest, whole = plan.remainder, "base plus patch is the tuned model"
    if rest is None:
        console.say(f"{whole} only if nothing else was changed")
    elif rest.left:
        console.say("base plus patch is NOT the tuned model: it has only these neurons of it")
        console.say(f"still different: {some(rest.left)}")
    else:
        console.say(f"{whole}, bit for bit{', in all that was compared' if rest.not_compared else ''}")
    if rest is not None and rest.not_compared:
        console.say(f"not compared: {some(rest.not_compared)}")
    share = percent(nbytes / plan.base.nbytes) if plan.base.nbytes else "0%"
    console.say(f"{'would write' if dry_run else 'wrote'} {plan.out} ({size(nbytes)}, {share} of the base)")


def _refuse(names: Iterable[str], given: str, why: str) -> None:
    """Refuse options that do not go with another one that was given."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"[[{name}]] does not go with [[{given}]]", hint=why)
