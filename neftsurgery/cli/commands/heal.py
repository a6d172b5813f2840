"""``neftsurgery heal``."""

from __future__ import annotations

import sys

import click

from ...checkpoint.healing import HealPlan, plan_heal
from ...errors import UsageError
from ...text import commas, label, plural, size
from ..console import Console
from ..options import common_options, dry_run_option

_SHOWN = 20
_SHOWN_RANGES = 5


@click.command("heal")
@click.argument("checkpoint")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@common_options
def command(console: Console, checkpoint: str, yes: bool, dry_run: bool) -> None:
    """Undo a change in place that was interrupted.

    The old neurons are written back from the journal in the folder of CHECKPOINT (for a file: beside it). A
    stranger may have put the journal there: look at what it would write, and say no if you did not change
    this checkpoint in place.
    Nothing is written through a symlink, or into a file with several hard links.

    \b
    Example:
      neftsurgery heal model/ --dry-run
      neftsurgery heal model/ --yes
    """
    plan = plan_heal(checkpoint)
    _say(console, plan)
    if plan.restorations and not (yes or dry_run):
        _ask(console)
    facts = plan.describe()
    healed = False
    if not (dry_run and plan.restorations):
        result = plan.run()
        healed = bool(result.journals)
        console.say(str(result))
    console.answer({**facts, "selected": plan.neurons, "healed": healed, "dry_run": dry_run})


def _say(console: Console, plan: HealPlan) -> None:
    for restoration in plan.restorations:
        facts = restoration.describe()
        whose = "written here by you" if facts["recorded"] else "NOT known to be yours"
        console.say(f"{facts['journal']} ({whose})")
        console.say(
            f"would write {plural(restoration.neurons, restoration.unit)} ({size(facts['bytes'])}) into"
        )
        for file in facts["files"]:
            console.say(f"  {file}")
        rows = [
            [label(tensor["name"], 100), f"{commas(tensor['neurons'])} of {commas(tensor['of'])}",
             _ranges(tensor["ranges"], tensor["neurons"])]
            for tensor in facts["tensors"]
        ]  # fmt: skip
        console.say_table(rows, shown=_SHOWN, rest="more; see them with --json")


def _ranges(ranges: list[list[int]], neurons: int) -> str:
    shown = ranges[:_SHOWN_RANGES]
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in shown)
    return text + (", …" if sum(last - first + 1 for first, last in shown) < neurons else "")


def _ask(console: Console) -> None:
    """Ask on a terminal; elsewhere the answer must be on the command line."""
    if console.as_json or console.quiet or not sys.stdin.isatty():
        raise UsageError("healing must be confirmed", hint="look at it with --dry-run, then say --yes")
    if not click.confirm("Write them?", err=True):
        raise click.Abort
