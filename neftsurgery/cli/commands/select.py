"""``neftsurgery select``."""

from __future__ import annotations

from typing import Any

import click

from ...errors import MismatchError
from ...options import BudgetOptions, SeedOptions, SelectOptions
from ...scoring.scores import Scores
from ...selection.budget import Budget
from ...storage.output_checks import refuse_output
from ...text import commas, natural_key, percent, plural
from ..console import Console
from ..options import options_of, output_option, take_budget, writing_options


@click.command("select")
@click.argument("scores")
@output_option("SELECTION", required=True, text="Write the selection to this file.")
@options_of(BudgetOptions, SeedOptions)
@writing_options
def command(console: Console, scores: str, out: str, force: bool, dry_run: bool, **options: Any) -> None:
    """Choose neurons from SCORES.

    The options of the budget say how many, and which first.

    \b
    Example:
      neftsurgery select scores.safetensors --neurons 3% -o best.safetensors
      neftsurgery select scores.safetensors --like best.safetensors --policy random -o control.safetensors
    """
    budget, inputs = take_budget(options, SelectOptions)
    with Scores.load(scores) as loaded:
        refuse_output(out, inputs=[scores, *inputs], force=force, kind="file")
        checked = Budget.of(**budget)
        selection, warnings = loaded.choose(checked), checked.warnings(loaded.units or loaded.neurons)
        if not selection.tensors:
            raise MismatchError("no neuron is chosen", file=scores, hint="the threshold may be too high")
        console.warn(warnings)
        if not dry_run:
            selection.save(out, force=force)
        console.say(
            f"{'would choose' if dry_run else 'chose'} {plural(selection.neurons, 'neuron')} of "
            f"{commas(loaded.neurons)} in {plural(len(selection.tensors), 'tensor')}, "
            f"{commas(selection.parameters)} parameters "
            f"({percent(selection.parameters / loaded.parameters)} of the model)"
        )
        captured = selection.facts.captured
        if captured is not None:
            console.say(f"they hold {percent(captured)} of the whole change")
        most = sorted(selection, key=lambda chosen: (-len(chosen.index), natural_key(chosen.info.name)))[:5]
        cells = ((one.info.name[:120], len(one.index), one.layout.count) for one in most)
        console.say_table([[name, commas(n), f"of {commas(count)}"] for name, n, count in cells], right=[1])
        if not dry_run:
            console.say(f"wrote {out}")
        facts = {"neurons": loaded.neurons, **selection.describe(), "parameters": loaded.parameters}
        facts |= {"captured": captured, "captured_scored": selection.facts.captured_scored}
        console.answer(facts | {"out": out, "warnings": warnings}, dry_run=dry_run)
