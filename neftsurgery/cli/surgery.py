"""What apply and revert share on the command line."""

from __future__ import annotations

import click

from ..surgery.operation import Surgery
from ..surgery.state import summary
from ..text import plural, size
from .console import Console

__all__ = ["in_place_option", "say_surgery"]

in_place_option = click.option(
    "--in-place",
    is_flag=True,
    help="Change the checkpoint itself: only the touched rows are written, the old ones journaled first.",
)


def say_surgery(console: Console, plan: Surgery, goal: str, dry_run: bool) -> None:
    """Say what an apply or revert did, or would do."""
    tensors = {name for rows in plan.rows for name in rows.patch.tensors}
    what = f"{plural(plan.neurons, 'neuron')} in {plural(len(tensors), 'tensor')}"
    where = str(plan.out) if plan.out is not None else plan.checkpoint.name
    was = plan.states[0].state if len(plan.states) == 1 else None
    if plan.out is None and not plan.needed:
        console.say(f"{where} is {goal} already: nothing to write")
    elif dry_run:
        console.say(f"would write {what} of {where}")
    else:
        console.say(f"{where}: {what} are now as {'patched' if goal == 'patched' else 'in the base'}")
    if was is not None and was != ("base" if goal == "patched" else "patched") and plan.needed:
        console.note(f"note: it was partly {goal} already")
    if plan.files is not None and plan.files.left:
        names = ", ".join(str(path) for path in plan.files.left)
        console.note(f"left behind (other forms of the weights, or not part of the model): {names}")
    nbytes = sum(shard.size for shard in plan.checkpoint.shards)
    if plan.out is not None and dry_run:
        console.say(f"it takes {size(nbytes)}")
    console.answer(
        {
            "checkpoint": plan.checkpoint.name,
            "out": None if dry_run or plan.out is None else str(plan.out),
            "in_place": plan.out is None,
            "state_before": [summary(state.tensors) for state in plan.states],
            "written": plan.needed and not dry_run,
            "tensors": len(tensors),
            "neurons": plan.neurons,
            "selected": plan.neurons,
            "captured": plan.rows[0].patch.facts.get("captured") if len(plan.rows) == 1 else None,
            "left_behind": [str(path) for path in plan.files.left] if plan.files is not None else [],
            "dry_run": dry_run,
        },
        plan.timing,
    )
