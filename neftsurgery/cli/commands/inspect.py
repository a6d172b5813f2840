"""``neftsurgery inspect``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import click

from ...errors import spelled
from ...options import InspectOptions
from ...surgery.inspect import inspect
from ...text import commas, size
from ..console import Console, flag, table
from ..options import common_options, options_of, take

_SHOWN = 40


@click.command("inspect")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--all", "show_all", is_flag=True, help="List every tensor, not only the first ones.")
@options_of(InspectOptions)
@common_options
def command(console: Console, paths: tuple[str, ...], show_all: bool, **options: Any) -> None:
    """Show what is in a checkpoint, scores, selection or patch.

    With several patches, show where they overlap.

    \b
    Example:
      neftsurgery inspect neuron_patch.safetensors
      neftsurgery inspect base/ --anatomy
      neftsurgery inspect german.safetensors french.safetensors
    """
    facts = inspect(paths, **take(options, InspectOptions))
    for number, rows in enumerate(facts.tables):
        if number:
            console.say()
        for line in table(rows, right=range(1, len(rows[0]) - 1) if facts.get("lossless") else ()):
            console.say(spelled(line, flag))
    for journal in facts.get("unfinished", ()):
        console.note(
            f"warning: {journal}: a change in place was interrupted or is under way; "
            f"see what it would write back: neftsurgery heal {shlex.quote(str(facts['name']))} --dry-run"
        )
    console.warn(facts.get("warnings", ()))
    if "tensors" in facts:
        console.say()
        rows = [_tensor(tensor) for tensor in facts["tensors"]]
        console.say_table(rows, shown=None if show_all else _SHOWN, rest="more: see them with --all")
    console.answer(facts)


def _tensor(tensor: Mapping[str, Any]) -> list[str]:
    if "changed" in tensor:
        what = f"{commas(tensor['changed'])} changed, {size(tensor['code'])}"
    elif "reason" in tensor:
        what = f"not scored: {tensor['reason']}"
    else:
        of = f" of {commas(tensor['of'])}" if "of" in tensor else ""
        axes = ", ".join(str(axis) for axis in tensor["neuron_axes"])
        what = f"{commas(tensor['neurons'])}{of} neurons along axis {axes}"
    return [tensor["name"][:120], tensor["dtype"], str(tensor["shape"]), what]
