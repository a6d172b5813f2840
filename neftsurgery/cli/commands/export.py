"""``neftsurgery export``."""

from __future__ import annotations

from typing import Any

import click

from ...progress import Timing
from ...surgery.export import plan_export
from ...text import commas, plural, size
from ..console import Console
from ..options import WholeNumber, base_option, output_option, writing_options

__all__ = ["command"]


@click.command("export")
@click.argument("patch")
@click.option(
    "--to", "form", type=click.Choice(["lora"]), required=True, help="What to write: a LoRA adapter for PEFT."
)
@output_option("DIR", required=True, text="The adapter folder.")
@base_option
@click.option(
    "--rank",
    type=WholeNumber(min=1),
    metavar="N",
    help="Pad to this rank. Default: the next rank that vLLM takes.",
)
@click.option(
    "--prefix",
    default="",
    metavar="TEXT",
    help="Put this before module names, where the files lack it: transformer. for a GPT-2 without its head.",
)
@writing_options
def command(console: Console, patch: str, form: str, out: str, dry_run: bool, **options: Any) -> None:
    """Write PATCH as an exact LoRA adapter.

    PEFT and vLLM load it. Biases, norms, embeddings, convolutions and stacked experts have no LoRA form and
    are refused by name.

    \b
    Example:
      neftsurgery export neuron_patch.safetensors --to lora -o adapter/ --base base/
      neftsurgery export reversible_patch.safetensors --to lora -o adapter/ --rank 64
    """
    plan = plan_export(patch, out, **options)
    console.warn(plan.warnings)
    facts = plan.describe() | {"patch": patch, "to": form, "inexact": None}
    columns = sum(not module.rows for module in plan.modules)
    console.say(
        f"{plural(len(plan.modules), 'module')} ({commas(columns)} of columns) at rank {plan.rank}; "
        f"the largest needs {plan.needed}"
    )
    nbytes, timing = plan.nbytes, Timing()
    if not dry_run:
        result = plan.run(**console.running)
        nbytes, timing = result.nbytes, result.timing
        facts |= {"bytes": nbytes, "inexact": result.inexact}
        console.say(result.exactness)
    console.say(
        f"{'would write' if dry_run else 'wrote'} {out} ({size(nbytes)}, "
        f"{nbytes / plan.patch.nbytes:.1f} times the patch's {size(plan.patch.nbytes)})"
    )
    console.answer(facts, timing, dry_run=dry_run)
