"""``neftsurgery push``."""

from __future__ import annotations

import click

from ...hub.push import plan_push, send
from ...patch.patch import Patch
from ...text import plural
from ..console import Console
from ..options import common_options, dry_run_option

__all__ = ["command"]


@click.command("push")
@click.argument("patch")
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that is public.")
@click.option(
    "--revision", metavar="BRANCH", help="Push to this branch, made if it is not there. Default: main."
)
@click.option("-m", "--message", metavar="TEXT", help="The commit's message.")
@click.option(
    "--base", metavar="REPO[@REV]", help="The base on the Hub, where the patch was made from a local copy."
)
@click.option("--parent", metavar="COMMIT", help="Refuse unless this full hash is the branch's last commit.")
@click.option(
    "--replace-card",
    is_flag=True,
    help="Write a new card. By default what its owner wrote is kept, and our part of it renewed.",
)
@dry_run_option
@common_options
def command(
    console: Console,
    patch: str,
    repo: str,
    private: bool,
    revision: str | None,
    message: str | None,
    base: str | None,
    parent: str | None,
    replace_card: bool,
    dry_run: bool,
) -> None:
    """Publish PATCH on the Hugging Face Hub as ORG/NAME, with a model card, in one commit.

    The patch's hashes are checked before anything is sent. --dry-run shows the card. The token is the one of
    `hf auth login` or HF_TOKEN.

    \b
    Example:
      neftsurgery push neuron_patch.safetensors me/llama-french --dry-run
      neftsurgery push neuron_patch.safetensors me/llama-french --base meta-llama/Llama-3.2-1B --private
    """
    with Patch.load(patch) as loaded:
        plan = plan_push(
            loaded,
            repo,
            private=private or None,
            revision=revision,
            message=message,
            base=base,
            parent=parent,
            replace_card=replace_card,
            dry_run=dry_run,
            progress=console.progress,
        )
        for warning in plan.warnings:
            console.note(f"warning: {warning}")
        done = None if dry_run else send(plan)
    what = f"{plural(loaded.neurons, 'neuron')} of {plural(len(loaded.tensors), 'tensor')}"
    if done is None:
        console.say(plan.card)
        new = "" if plan.remote.exists else ", a new repository"
        console.say(f"would push {what} with this card to {repo} ({plan.remote.branch}{new})")
    elif done.changed:
        made = f"made {repo}, and " if done.created else ""
        console.say(f"{made}pushed {what} to {done.url} ({done.branch}, commit {done.commit})")
    else:
        console.say(f"{repo} has all of this already: nothing to push")
    console.answer(
        {
            "patch": patch,
            "repo": repo,
            "revision": plan.remote.branch,
            "parent": plan.remote.head,
            "commit": None if done is None else done.commit,
            "url": None if done is None else done.url,
            "created": done is not None and done.created,
            "changed": done is not None and done.changed,
            "private": plan.remote.private if plan.remote.exists else plan.private,
            "files": plan.files,
            "message": plan.message,
            "base": plan.base.repo,
            "base_revision": plan.base.revision,
            "neurons": loaded.neurons,
            "selected": loaded.neurons,
            "card": plan.card,
            "warnings": list(plan.warnings),
            "dry_run": dry_run,
        }
    )
