"""``neftsurgery export``."""

from __future__ import annotations

from typing import Any

import click

from ...live.export_lora import plan_lora
from ...options import ExportOptions
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
def command(console: Console, patch: str, form: str, dry_run: bool, **options: Any) -> None:
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
    plan = plan_lora(patch, **take(options, ExportOptions), **options)
    done = console.carry_out(plan, dry_run)
    columns = sum(not module.place.rows for module in plan.modules)
    console.say(
        f"{plural(len(plan.modules), 'module')} ({commas(columns)} of columns) at {ranks(plan.modules)}; "
        f"the largest needs {plan.needed}"
    )
    if not dry_run:
        console.say(done.exactness)
    console.say(
        f"{'would write' if dry_run else 'wrote'} {plan.out} ({size(done.nbytes)}, "
        f"{done.nbytes / plan.patch.nbytes:.1f} times the patch's {size(plan.patch.nbytes)})"
    )
    facts = {"patch": patch, "to": form, "bytes": done.nbytes, "inexact": None if dry_run else done.inexact}
    console.answer(plan.describe() | facts, done.timing, dry_run=dry_run)
