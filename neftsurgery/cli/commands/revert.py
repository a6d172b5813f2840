"""``neftsurgery revert``."""

from __future__ import annotations

from typing import Any

import click

from ...surgery.apply import plan_revert, undo_unfinished
from ..console import Console
from ..options import base_option
from .apply import rewriting_options, run_rewrite, target_options


@click.command("revert")
@click.argument("checkpoint")
@click.argument("patch")
@target_options
@base_option
@rewriting_options
def command(
    console: Console, checkpoint: str, patch: str, in_place: bool, dry_run: bool, **options: Any
) -> None:
    """Take PATCH out of CHECKPOINT again, bit for bit.

    The values that PATCH replaced come from PATCH itself if it is reversible, else from --base.

    \b
    Example:
      neftsurgery revert patched/ neuron_patch.safetensors --base base/ -o restored/
      neftsurgery revert patched.safetensors reversible_patch.safetensors --in-place
    """
    if in_place and not dry_run:
        undo_unfinished(checkpoint)
    plan = plan_revert(checkpoint, patch, in_place=in_place, **options, **console.running)
    run_rewrite(console, plan, dry_run)
