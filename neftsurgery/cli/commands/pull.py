"""``neftsurgery pull``."""

from __future__ import annotations

import click

from ...hub.pull import fetch, plan_pull
from ...text import plural, size
from ..console import Console
from ..options import common_options, dry_run_option, force_option, output_option

__all__ = ["command"]


@click.command("pull")
@click.argument("named", metavar="ORG/NAME[@REV]")
@output_option("PATCH", required=True, text="Write the patch to this file.")
@force_option
@dry_run_option
@common_options
def command(console: Console, named: str, out: str, force: bool, dry_run: bool) -> None:
    """Fetch the patch of the Hub repository ORG/NAME, check all of its hashes, and write it to a file.

    Commands that take a PATCH take ORG/NAME[@REV] as well; pull is for a file of one's own.

    \b
    Example:
      neftsurgery pull me/llama-french -o neuron_patch.safetensors
      neftsurgery pull me/llama-french@v2 -o neuron_patch.safetensors --force
    """
    plan = plan_pull(named, out, force=force)
    commit = plan.remote.commit if plan.remote is not None else None
    nbytes = plan.remote.nbytes if plan.remote is not None else None
    neurons = None
    if dry_run:
        what = "from the cache" if plan.remote is None else f"{size(nbytes or 0)}, commit {commit}"
        console.say(f"would fetch {named} ({what}) and write {out}")
    else:
        with fetch(plan, out, force=force, progress=console.progress) as patch:
            nbytes, neurons, tensors = patch.nbytes, patch.neurons, len(patch.tensors)
        what = f"{plural(neurons, 'neuron')} of {plural(tensors, 'tensor')}, all hashes right"
        console.say(f"{named}: {what}" + (f" (commit {commit})" if commit else ""))
        console.say(f"wrote {out} ({size(nbytes)})")
    console.answer(
        {
            "named": named,
            "commit": commit,
            "out": None if dry_run else out,
            "bytes": nbytes,
            "neurons": neurons,
            "selected": neurons,
            "dry_run": dry_run,
        }
    )
