"""``neftsurgery inspect``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import starmap
from typing import Any

import click

from ...checkpoint.checkpoint import Checkpoint
from ...errors import UsageError, spelled
from ...neurons.tensor_names import UNKNOWN_EXPERTS, UNKNOWN_LAYER
from ...options import InspectOptions
from ...sources.resolve import resolve
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
    facts |= _class_axes(paths[0], facts)
    if told := facts.get("class_axes"):
        console.note(f"the layers of transformers' class tell: {' '.join(starmap(_scope, told.items()))}")
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


def _scope(kind: str, axes: tuple[int, ...]) -> str:
    text = shlex.quote(f"{kind}={','.join(map(str, axes))}" if axes else kind)
    return f"{'--axis' if axes else '--exclude'} {text}"


def _class_axes(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the live class tells of the weights that the table does not know, with the training extra."""
    known = {part["model_type"]: part["known"] for part in facts.get("parts", ())}
    kinds = [
        kind
        for kind in facts.get("kinds", ())
        if kind.get("reason", "").startswith((UNKNOWN_EXPERTS, UNKNOWN_LAYER))
        or ("neuron_axes" in kind and not known.get(kind["part"]))
    ]
    if not kinds or not facts["model_type"] or find_spec("transformers") is None:
        return {}
    from ...live.class_axes import class_axes

    read = {kind["name"]: tuple(kind.get("neuron_axes", ())) for kind in kinds}
    try:
        told = class_axes(Checkpoint.read(resolve(name)), read)
    except UsageError as error:  # transformers does not know it either
        return {"warnings": [*facts["warnings"], error.text(flag)]}
    return {"class_axes": {kind: axes for kind, axes in told.items() if axes != read[kind]}}


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
