"""``neftsurgery select``."""

from __future__ import annotations

from typing import Any

import click

from ...errors import MismatchError
from ...scoring.scores import Scores
from ...selection.selection import Selection
from ...storage.output_checks import refuse_output
from ...text import amount, percent, plural
from ..console import Console, table
from ..options import (
    budget_options,
    common_options,
    dry_run_option,
    force_option,
    output_option,
    seed_option,
    take_budget,
)

__all__ = ["command"]


@click.command("select")
@click.argument("scores")
@output_option("SELECTION", required=True, text="Write the selection to this file.")
@budget_options
@seed_option
@force_option
@dry_run_option
@common_options
def command(
    console: Console, scores: str, out: str, seed: int, force: bool, dry_run: bool, **options: Any
) -> None:
    """Choose neurons from a SCORES file.

    \b
    Example:
      neftsurgery select scores.safetensors --neurons 3% -o selection.safetensors
      neftsurgery select scores.safetensors --like selection.safetensors --policy random -o control
    """
    budget = take_budget(options)
    like = [budget["like"]] if "like" in budget else []
    if "like" in budget:
        budget["like"] = Selection.load(budget["like"])
    refuse_output(out, inputs=[scores, *like], force=force, kind="file")
    with Scores.load(scores) as loaded:
        selection = loaded.select(**budget, seed=seed)
        if not selection.tensors:
            raise MismatchError("no neuron is chosen", file=scores, hint="the threshold may be too high")
        if not dry_run:
            selection.save(out, force=force)
        captured = selection.facts.get("captured")
        text = f"{plural(selection.neurons, 'neuron')} of {amount(loaded.neurons)}"
        console.say(
            f"{'would choose' if dry_run else 'chose'} {text} in {plural(len(selection.tensors), 'tensor')}, "
            f"{amount(selection.parameters)} parameters "
            f"({percent(selection.parameters / loaded.parameters)} of the model)"
        )
        if captured is not None:
            console.say(f"they hold {percent(captured)} of the whole change")
        for line in table(_largest(selection), right=[1]):
            console.say(line)
        if not dry_run:
            console.say(f"wrote {out}")
        console.answer(
            {
                "neurons": loaded.neurons,
                "selected": selection.neurons,
                "selected_parameters": selection.parameters,
                "parameters": loaded.parameters,
                "captured": captured,
                "captured_scored": selection.facts.get("captured_scored"),
                "tensors": {name: len(chosen.index) for name, chosen in selection.tensors.items()},
                "out": None if dry_run else out,
                "dry_run": dry_run,
            }
        )


def _largest(selection: Selection, count: int = 5) -> list[list[str]]:
    most = sorted(selection, key=lambda chosen: (-len(chosen.index), chosen.info.name))[:count]
    return [[c.info.name[:120], amount(len(c.index)), f"of {amount(c.layout.count)}"] for c in most]
