"""``neftsurgery revert``."""

from __future__ import annotations

import click

from ...patch.patch import Patch
from ...surgery.apply import plan_revert, undo_unfinished
from ..console import Console
from ..options import base_option, common_options, dry_run_option, force_option
from ..rewrite import run_rewrite, target_options

__all__ = ["command"]


@click.command("revert")
@click.argument("checkpoint")
@click.argument("patch")
@target_options
@base_option
@force_option
@dry_run_option
@common_options
def command(
    console: Console,
    checkpoint: str,
    patch: str,
    out: str | None,
    in_place: bool,
    base: str | None,
    force: bool,
    dry_run: bool,
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
    plan = plan_revert(
        checkpoint,
        Patch.load(patch),
        base=base,
        out=out,
        in_place=in_place,
        force=force,
        limits=console.limits,
        progress=console.progress,
    )
    run_rewrite(console, plan, dry_run)
