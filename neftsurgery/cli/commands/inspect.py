"""``neftsurgery inspect``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import click

from ...options import ScopeOptions
from ...surgery.inspect import inspect
from ...text import commas, percent, plural, size
from ..console import Console, table
from ..options import common_options, options_of, take

__all__ = ["command"]

_SHOWN = 40


@click.command("inspect")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--all", "show_all", is_flag=True, help="List every tensor, not only the first ones.")
@options_of(ScopeOptions)
@common_options
def command(console: Console, paths: tuple[str, ...], show_all: bool, **options: Any) -> None:
    """Show what is in a checkpoint, scores, selection or patch.

    With several patches, show where they overlap.

    \b
    Example:
      neftsurgery inspect neuron_patch.safetensors
      neftsurgery inspect base/ --anatomy units
      neftsurgery inspect german.safetensors french.safetensors
    """
    facts = inspect(paths, **take(options, ScopeOptions))
    if facts["kind"] == "patches":
        _say_patches(console, facts)
        console.answer(facts)
        return
    for line in table(_head(facts)):
        console.say(line)
    for journal in facts.get("unfinished", ()):
        console.note(
            f"warning: {journal}: a change in place was cut short, or is under way; "
            f"see what it would write back: neftsurgery heal {shlex.quote(str(facts['name']))} --dry-run"
        )
    for warning in facts.get("warnings", ()):
        console.note(f"warning: {warning}")
    console.say()
    tensors = facts["tensors"]
    shown = tensors if show_all else tensors[:_SHOWN]
    for line in table([_tensor(tensor) for tensor in shown]):
        console.say(line)
    if len(tensors) > len(shown):
        console.say(f"  and {commas(len(tensors) - len(shown))} more: see them with --all")
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
        rows.append(["parameters", commas(facts["parameters"])])
    rows.append(
        [
            "neurons",
            commas(facts["neurons"]) + (f" in {commas(facts['units'])} units" if facts.get("units") else ""),
        ]
    )
    for key in ("anatomy", "score"):
        if key in facts:
            rows.append([key, str(facts[key])])
    if "reversible" in facts:
        rows.append(["reversible", "yes" if facts["reversible"] else "no: revert needs --base"])
    rows += _origin(facts)
    return rows


def _say_patches(console: Console, facts: Mapping[str, Any]) -> None:
    patches = facts["patches"]
    for number, patch in enumerate(patches, 1):
        what = f"{plural(patch['neurons'], 'neuron')} of {plural(len(patch['tensors']), 'tensor')}"
        console.say(f"  {number}  {patch['name']}: {what}, {size(patch['bytes'])}")
    console.say()
    rows = []
    for found in facts["overlaps"]:
        first, second = found["first"] + 1, found["second"] + 1
        shared = (
            f"{plural(found['neurons'], 'neuron')} in common, of {plural(len(found['tensors']), 'tensor')}"
        )
        rows.append([f"{first} and {second}", shared, _bases(found)])
    for line in table(rows):
        console.say(line)


def _bases(found: Mapping[str, Any]) -> str:
    """What an overlap says of the two bases."""
    if found["unfit"]:
        return f"for different models: {found['unfit'][0][:120]} has another shape or dtype"
    if found["foreign"]:
        return f"different bases: {plural(found['foreign'], 'neuron')} in common were not the same"
    if found["same_base"] is False:
        return "different bases: their fingerprints differ"
    said = "one base" if found["same_base"] else "the patches do not say whether their bases are the same"
    if found["crossing"]:
        said += f"; rows and columns cross in {plural(len(found['crossing']), 'tensor')}"
    return said


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
    if isinstance(selection.get("merged"), dict):
        rows.append(["merged", _merged(selection["merged"])])
    if facts.get("captured_by_budget"):
        shares = ", ".join(f"{budget}: {percent(s)}" for budget, s in facts["captured_by_budget"].items())
        rows.append(["captures", shares])
    return rows


def _merged(merged: Mapping[str, Any]) -> str:
    """Which patches a patch was merged from. A manifest may hold any JSON there."""
    parts = merged.get("patches")
    names = (
        [str(part.get("name") or "?") for part in parts if isinstance(part, dict)]
        if isinstance(parts, list)
        else []
    )
    return f"from {', '.join(names)} ({merged.get('on_overlap')})"


def _tensor(tensor: Mapping[str, Any]) -> list[str]:
    if "reason" in tensor:
        what = f"not scored: {tensor['reason']}"
    else:
        of = f" of {commas(tensor['of'])}" if "of" in tensor else ""
        axes = ", ".join(str(axis) for axis in tensor["neuron_axes"])
        what = f"{commas(tensor['neurons'])}{of} neurons along axis {axes}"
    return [tensor["name"][:120], tensor["dtype"], str(tensor["shape"]), what]
