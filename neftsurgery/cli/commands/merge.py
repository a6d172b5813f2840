"""``neftsurgery merge``."""

from __future__ import annotations

from typing import Any

import click

from ...errors import UsageError
from ...options import ChainOptions
from ...patch.merging import DENSITY, POLICIES
from ...surgery.lossless import LosslessPlan
from ...surgery.merge import plan_merge
from ...text import commas, plural, size
from ..console import Console
from ..options import options_of, output_option, writing_options
from .extract import run_lossless


@click.command("merge")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH PATCH...")
@output_option("PATCH", required=True, text="Write the merged patch to this file.")
@click.option(
    "--on-overlap",
    type=click.Choice(POLICIES),
    default="error",
    show_default=True,
    help="What becomes of neurons that several patches replace: the first or last patch wins, the mean of "
    "their values, the sum of their differences from the base, or TIES-Merging of these.",
)
@click.option("--weights", metavar="A,B,...", help="One number per patch, for mean, sum and ties.")
@click.option(
    "--density",
    type=float,
    metavar="X",
    help=f"The share of the differences that ties keeps. Default: {DENSITY}.",
)
@options_of(ChainOptions)
@click.option(
    "--base",
    metavar="BASE",
    help="The checkpoint that the patches were made from; of a chain, the first one. Without --chain, only "
    "sum and ties need it, for patches that are not reversible.",
)
@click.option(
    "--reversible/--no-reversible",
    default=None,
    help="Whether to keep the replaced values. Default: keep them if every patch does.",
)
@writing_options
def command(
    console: Console,
    patches: tuple[str, ...],
    weights: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Make one patch from several PATCHes of one base.

    Neurons that one patch alone replaces are taken as they are. Patches of different bases are refused. With
    --chain, lossless patches that follow each other become one lossless patch, or those of a folder.

    \b
    Example:
      neftsurgery merge german.safetensors french.safetensors -o both.safetensors
      neftsurgery merge client*.safetensors -o round1.safetensors --on-overlap mean --weights 120,80,310
      neftsurgery merge a.safetensors b.safetensors -o ab.safetensors --on-overlap ties --base base/
      neftsurgery merge --chain run/ --base base/ -o whole-run.safetensors
    """
    plan = plan_merge(patches, weights=_numbers(weights), progress=console.progress, **options)
    if isinstance(plan, LosslessPlan):
        run_lossless(console, plan, dry_run)
        return
    done = console.carry_out(plan, dry_run)
    chosen, how = plan.new.selection, f" ({plan.rule.name})" if plan.shared else ""
    console.say(
        f"{'would merge' if dry_run else 'merged'} {len(patches)} patch{'es' if len(patches) > 1 else ''}: "
        f"{plural(chosen.neurons, 'neuron')} of {plural(len(chosen.tensors), 'tensor')}, "
        f"{commas(plan.shared)} in several of them{how}"
    )
    console.say(f"{'would write' if dry_run else 'wrote'} {plan.out} ({size(done.nbytes)})")
    facts = plan.describe() | {"patches": list(patches), "bytes": done.nbytes}
    console.answer(facts, done.timing, dry_run=dry_run)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"[[weights]]: {text!r} is not a comma-separated list of numbers, such as 1,0.5"
        ) from None
