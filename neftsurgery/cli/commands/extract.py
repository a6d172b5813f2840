"""``neftsurgery extract``."""

from __future__ import annotations

from typing import Any

import click

from ...options import BudgetOptions, CompareOptions, ExtractOptions, LosslessOptions, SpreadOptions
from ...progress import Timing
from ...surgery.extract import ExtractPlan, plan_extract
from ...surgery.lossless import LosslessPlan
from ...text import commas, percent, plural, size, some
from ..console import Console
from ..options import options_of, output_option, take_budget, writing_options


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
@options_of(CompareOptions, SpreadOptions)
@writing_options
def command(console: Console, base: str, tuned: str, dry_run: bool, **options: Any) -> None:
    """Choose neurons of TUNED, and write them as a patch on BASE.

    The neurons are scored first, unless --scores or --selection is given. With --lossless nothing is chosen:
    the patch is the whole fine-tune, to the bit.

    \b
    Example:
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --neurons 3%
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --changed --include '*' --with-bias
      neftsurgery extract base/ tuned/ -o whole.safetensors --lossless
    """
    choosing, inputs = take_budget(options, ExtractOptions)
    plan = plan_extract(base, tuned, inputs=inputs, **choosing, **options, **console.running)
    if isinstance(plan, LosslessPlan):
        run_lossless(console, plan, dry_run)
        return
    done = console.carry_out(plan, dry_run)
    _say(console, plan, done.nbytes, dry_run)
    console.answer(plan.describe() | {"bytes": done.nbytes}, done.timing, dry_run=dry_run)


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
