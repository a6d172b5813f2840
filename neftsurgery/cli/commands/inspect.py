"""``neftsurgery inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ...surgery.inspect import inspect
from ..console import Console, amount, percent, plural, size, table
from ..options import common_options, scope_options, take_scope

__all__ = ["command"]

_SHOWN = 40


@click.command("inspect")
@click.argument("path")
@click.option("--all", "show_all", is_flag=True, help="List every tensor, not only the first ones.")
@scope_options
@common_options
def command(console: Console, path: str, show_all: bool, **options: Any) -> None:
    """What is in PATH: a checkpoint, scores, a selection or a patch.

    \b
    Example:
      neftsurgery inspect neuron_patch.safetensors
      neftsurgery inspect base/ --anatomy units
    """
    scope = take_scope(options)
    facts = inspect(
        path,
        anatomy=scope.anatomy,
        axis=scope.axis,
        include=scope.include,
        exclude=scope.exclude,
        only=scope.only,
    )
    for line in table(_head(facts)):
        console.say(line)
    for warning in facts.get("warnings", ()):
        console.note(f"warning: {warning}")
    console.say()
    tensors = facts["tensors"]
    shown = tensors if show_all else tensors[:_SHOWN]
    for line in table([_tensor(tensor) for tensor in shown]):
        console.say(line)
    if len(tensors) > len(shown):
        console.say(f"  and {amount(len(tensors) - len(shown))} more: see them with --all")
    console.answer(facts)


def _head(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = [[facts["kind"], str(facts["name"])]]
    if "files" in facts:
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in facts["dtypes"].items())
        rows += [
            ["weights", f"{plural(len(facts['files']), 'file')}, {size(facts['bytes'])}: {dtypes}"],
            ["model type", str(facts["model_type"] or "unknown: no config.json beside the weights")],
        ]
    elif "bytes" in facts:
        rows.append(["size", size(facts["bytes"])])
    if "parameters" in facts:
        rows.append(["parameters", amount(facts["parameters"])])
    rows.append(
        [
            "neurons",
            amount(facts["neurons"]) + (f" in {amount(facts['units'])} units" if facts.get("units") else ""),
        ]
    )
    for key in ("anatomy", "score"):
        if key in facts:
            rows.append([key, str(facts[key])])
    if "reversible" in facts:
        rows.append(["reversible", "yes" if facts["reversible"] else "no: revert needs --base"])
    rows += _origin(facts)
    return rows


def _origin(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for side in ("base", "tuned"):
        if isinstance(facts.get(side), dict) and facts[side]:
            known = [str(facts[side][key]) for key in ("repo", "revision", "name") if facts[side].get(key)]
            rows.append(
                [side, f"{' '.join(dict.fromkeys(known))}  {facts[side].get('fingerprint') or ''}".strip()]
            )
    selection = facts.get("selection") or {}
    if selection:
        chosen = ", ".join(f"{key} {value}" for key, value in (selection.get("budget") or {}).items())
        how = [str(selection[key]) for key in ("policy", "score", "anatomy") if key in selection]
        rows.append(["chosen", " ".join(how) + (f" ({chosen})" if chosen else "")])
        if selection.get("captured") is not None:
            rows.append(["captures", f"{percent(selection['captured'])} of the whole change"])
    if facts.get("captured_by_budget"):
        shares = ", ".join(f"{budget}: {percent(s)}" for budget, s in facts["captured_by_budget"].items())
        rows.append(["captures", shares])
    return rows


def _tensor(tensor: Mapping[str, Any]) -> list[str]:
    if "reason" in tensor:
        what = f"not scored: {tensor['reason']}"
    else:
        of = f" of {amount(tensor['of'])}" if "of" in tensor else ""
        axes = ", ".join(str(axis) for axis in tensor["neuron_axes"])
        what = f"{amount(tensor['neurons'])}{of} neurons along axis {axes}"
    return [tensor["name"][:120], tensor["dtype"], str(tensor["shape"]), what]
