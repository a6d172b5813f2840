"""``neftsurgery export``."""

from __future__ import annotations

from typing import Any

import click

from ...live.export_lora import plan_lora
from ...options import ExportOptions
from ...progress import Timing
from ...surgery.lora_modules import ranks
from ...text import commas, plural, size
from ..console import Console
from ..options import base_option, options_of, output_option, take, writing_options


@click.command("export")
@click.argument("patch")
@click.option(
    "--to", "form", type=click.Choice(["lora"]), required=True, help="What to write: a LoRA adapter for PEFT."
)
@output_option("DIR", required=True, text="The adapter folder.")
@base_option
@options_of(ExportOptions)
@writing_options
def command(
    console: Console,
    patch: str,
    form: str,
    out: str,
    base: str | None,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Write PATCH as an exact LoRA adapter.

    PEFT and vLLM load it; only PEFT if it changes embeddings, convolutions or stacked experts. With the
    training extra and BASE's config, modules are named as in the live model, and nothing is written
    unless PEFT takes all of it. What has no LoRA form is refused by name.

    \b
    Example:
      neftsurgery export neuron_patch.safetensors --to lora -o adapter/ --base base/
      neftsurgery export reversible_patch.safetensors --to lora -o adapter/ --rank 64
      neftsurgery export neuron_patch.safetensors --to lora -o adapter/ --rank-pattern --dtype bf16
    """
    plan = plan_lora(patch, out, base=base, force=force, **take(options, ExportOptions))
    console.warn(plan.warnings)
    facts = plan.describe() | {"patch": patch, "to": form, "inexact": None}
    columns = sum(not module.place.rows for module in plan.modules)
    console.say(
        f"{plural(len(plan.modules), 'module')} ({commas(columns)} of columns) at {ranks(plan.modules)}; "
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
