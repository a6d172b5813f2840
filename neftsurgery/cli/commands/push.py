"""``neftsurgery push``."""

from __future__ import annotations

from typing import Any

import click

from ...hub.push import plan_push
from ..console import Console
from ..options import common_options, dry_run_option

_DONE = ("commit", "url", "created", "created_branch", "changed")


@click.command("push")
@click.argument("patch")
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--private",
    is_flag=True,
    default=None,
    help="Create the repository as private; refuse a public one.",
)
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Push to this branch; create it if it does not exist. Default: main.",
)
@click.option("-m", "--message", metavar="TEXT", help="The commit message.")
@click.option(
    "--base", metavar="REPO[@REV]", help="The base on the Hub, if the patch was made from a local copy."
)
@click.option("--parent", metavar="COMMIT", help="Refuse unless this full hash is the branch's last commit.")
@click.option(
    "--replace-card",
    is_flag=True,
    help="Write a new card. By default the owner's text is kept, and only the generated part is updated.",
)
@dry_run_option
@common_options
def command(console: Console, patch: str, repo: str, dry_run: bool, **options: Any) -> None:
    """Publish PATCH on the Hugging Face Hub, with a model card, in one commit.

    The patch's hashes are checked before anything is sent. --dry-run prints the card. The token is that of
    `hf auth login`, or HF_TOKEN.

    \b
    Example:
      neftsurgery push neuron_patch.safetensors me/llama-french --dry-run
      neftsurgery push neuron_patch.safetensors me/llama-french --base meta-llama/Llama-3.2-1B --private
    """
    plan = plan_push(patch, repo, dry_run=dry_run, progress=console.progress, **options)
    console.warn(plan.warnings)
    answer = plan.describe() | {"dry_run": dry_run}
    if dry_run:
        console.say(*plan.card.rstrip("\n").split("\n"))  # alone: it may go into a file
        for line in f"would {plan}".split("\n"):
            console.note(line)
    else:
        done = plan.run()
        console.say(*str(done).split("\n"))
        answer |= {key: getattr(done, key) for key in _DONE}
    console.answer(answer)
