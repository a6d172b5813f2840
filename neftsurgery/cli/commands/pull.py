"""``neftsurgery pull``."""

from __future__ import annotations

import click

from ...hub.pull import plan_pull
from ...patch.patch import Patch
from ...text import size
from ..console import Console
from ..options import output_option, writing_options


@click.command("pull")
@click.argument("named", metavar="ORG/NAME[@REV]")
@output_option("PATCH", required=True, text="Write the patch to this file.")
@click.option("--sha256", metavar="HEX", help="The SHA-256 that the file must have, as push shows it.")
@writing_options
def command(console: Console, named: str, out: str, sha256: str | None, force: bool, dry_run: bool) -> None:
    """Fetch a patch from the Hugging Face Hub, and check all of its hashes.

    Commands that take a PATCH also take ORG/NAME[@REV]: use pull only if you need the file itself.

    \b
    Example:
      neftsurgery pull me/llama-french -o neuron_patch.safetensors
      neftsurgery pull me/llama-french@v2 -o neuron_patch.safetensors --force
      neftsurgery pull me/llama-french -o neuron_patch.safetensors --sha256 9f86d081...
    """
    plan = plan_pull(named, out, sha256, force)
    answer = plan.describe() | {"dry_run": dry_run}
    if dry_run:
        console.say(f"would {plan}")
    else:
        with plan.run(progress=console.progress) as patch:
            neurons, nbytes, what = patch.neurons, patch.nbytes, patch.what
            checked = ", all hashes match" if isinstance(patch, Patch) else "; apply checks its blocks"
        answer |= {"out": out, "bytes": nbytes, "neurons": neurons, "selected": neurons}
        commit = f" (commit {answer['commit']})" if answer["commit"] else ""
        console.say(f"{named}: {what}{checked}{commit}")
        console.say(f"wrote {out} ({size(nbytes)})")
    console.answer(answer)
