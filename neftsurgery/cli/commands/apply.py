"""``neftsurgery apply``, and what ``neftsurgery revert`` shares with it."""

from __future__ import annotations

from typing import Any

import click

from ...surgery.apply import plan_apply, undo_unfinished
from ...surgery.rebuild import RebuildPlan
from ...surgery.rewrite import RewritePlan
from ...text import plural, size
from ..console import Console
from ..options import output_option, stack, writing

target_options = stack(
    output_option("OUT", text="The new checkpoint: a file for a file, else a folder."),
    click.option(
        "--in-place",
        is_flag=True,
        help="Change the checkpoint itself: write a journal of what changes, then the changes.",
    ),
)


rewriting_options = writing(
    force="Replace an existing output atomically. Also write to another model than PATCH was made for, "
    "where only the fingerprint tells."
)


@click.command("apply")
@click.argument("base")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@click.option(
    "--to", type=int, metavar="N", help="Of a folder of lossless patches: up to the one with this number."
)
@target_options
@click.option(
    "--sha256",
    multiple=True,
    metavar="HEX",
    help="The SHA-256 that PATCH must have, as sha256sum shows it; of several PATCHes, one each, in order.",
)
@rewriting_options
def command(
    console: Console, base: str, patches: tuple[str, ...], in_place: bool, dry_run: bool, **options: Any
) -> None:
    """Write a patched checkpoint: BASE with the neurons of one or more PATCHes.

    Every touched neuron of BASE is checked first: a patch for another base is refused before anything
    is written. BASE may be patched already, or partly. Lossless patches follow each other; a folder stands
    for its patches. In place they need the same weight files and headers before and after.

    \b
    Example:
      neftsurgery apply base/ neuron_patch.safetensors -o patched/
      neftsurgery apply base.safetensors neuron_patch.safetensors --in-place
      neftsurgery apply base/ run/ --to 120 -o step-120/
      neftsurgery apply base/ me/llama-french -o patched/ --sha256 9f86d081...
    """
    if in_place and not dry_run:
        undo_unfinished(base)
    plan = plan_apply(base, patches, in_place=in_place, **options, **console.running)
    run_rewrite(console, plan, dry_run)


def run_rewrite(console: Console, plan: RewritePlan | RebuildPlan, dry_run: bool) -> None:
    """Run an apply or revert, or say what it would do."""
    done = console.carry_out(plan, dry_run)
    console.say(_planned(plan) if dry_run else str(done).partition("\n")[0])
    if isinstance(plan, RewritePlan):
        _note(console, plan)
        if dry_run and plan.out is not None:
            console.say(f"it takes {size(plan.nbytes)}")
    elif not dry_run and plan.goal == "patched" and (left := plan.target.not_carried):
        console.note(f"the patch does not carry {', '.join(left)} of the tuned checkpoint")
    facts = plan.describe() | {"written": not dry_run and done.written}
    console.answer(facts, done.timing, dry_run=dry_run)


def _planned(plan: RewritePlan | RebuildPlan) -> str:
    name = plan.named.name if isinstance(plan, RebuildPlan) else plan.checkpoint.name
    if plan.out is None and not plan.needed:
        return f"{name} is {plan.goal} already: nothing to write"
    if isinstance(plan, RebuildPlan):
        where = f"of {name}" if plan.out is None else f"to {plan.out}"
        return f"would write {plural(len(plan.names), 'file')} {where}, {size(plan.nbytes)}"
    what = f"{plural(plan.neurons, 'neuron')} in {plural(plan.tensors, 'tensor')}"
    return f"would write {what} of {plan.out or name}"


def _note(console: Console, plan: RewritePlan) -> None:
    was = plan.states[0].state if len(plan.states) == 1 else None
    if was is not None and was != ("base" if plan.goal == "patched" else "patched") and plan.needed:
        console.note(f"note: it was partly {plan.goal} already")
    if plan.files.left:
        names = ", ".join(map(str, plan.files.left))
        console.note(f"left behind (other forms of the weights, or not part of the model): {names}")
