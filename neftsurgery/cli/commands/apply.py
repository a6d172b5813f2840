"""``neftsurgery apply``."""

from __future__ import annotations

import click

from ...patch.patch import Patch
from ...surgery.apply import plan_apply, undo_unfinished
from ..console import Console
from ..options import common_options, dry_run_option, force_option
from ..rewrite import run_rewrite, target_options

__all__ = ["command"]


@click.command("apply")
@click.argument("base")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@target_options
@force_option
@dry_run_option
@common_options
def command(
    console: Console,
    base: str,
    patches: tuple[str, ...],
    out: str | None,
    in_place: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Write a patched checkpoint: BASE with the neurons of one or more PATCHes.

    Every touched neuron of BASE is checked first: a patch for another base is refused before anything
    is written. BASE may be patched already, or partly.

    \b
    Example:
      neftsurgery apply base/ neuron_patch.safetensors -o patched/
      neftsurgery apply base.safetensors neuron_patch.safetensors --in-place
    """
    if in_place and not dry_run:
        undo_unfinished(base)
    plan = plan_apply(
        base,
        [Patch.load(patch) for patch in patches],
        out=out,
        in_place=in_place,
        force=force,
        limits=console.limits,
        progress=console.progress,
    )
    run_rewrite(console, plan, dry_run)
