"""``neftsurgery merge``."""

from __future__ import annotations

from typing import Any

import click

from ...errors import UsageError
from ...options import ChainOptions
from ...patch.merging import DENSITY, POLICIES
from ...surgery.chains import plan_chain
from ...surgery.merge import plan_merge
from ...surgery.merge_checks import OverlapRule, refuse_other_options
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
    out: str,
    on_overlap: str,
    weights: str | None,
    density: float | None,
    chain: bool,
    fast: bool | None,
    weights_only: bool | None,
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
    overlap = {"on_overlap": on_overlap, "weights": weights, "density": density}
    refuse_other_options(chain, overlap, {"fast": fast, "weights_only": weights_only})
    if chain:
        whole = plan_chain(patches, out=out, fast=fast, weights_only=weights_only, **options)
        run_lossless(console, whole, dry_run)
        return
    rule = OverlapRule.of(on_overlap, _numbers(weights), density, len(patches))
    plan = plan_merge(patches, rule, out=out, progress=console.progress, **options)
    done = console.carry_out(plan, dry_run)
    chosen, how = plan.new.selection, f" ({on_overlap})" if plan.shared else ""
    console.say(
        f"{'would merge' if dry_run else 'merged'} {len(patches)} patch{'es' if len(patches) > 1 else ''}: "
        f"{plural(chosen.neurons, 'neuron')} of {plural(len(chosen.tensors), 'tensor')}, "
        f"{commas(plan.shared)} in several of them{how}"
    )
    console.say(f"{'would write' if dry_run else 'wrote'} {out} ({size(done.nbytes)})")
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
