"""inspect: what is in a checkpoint, a scores file, a selection or a patch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Unpack

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dequantized import dequantized
from ..checkpoint.folder_files import file_notes, folder_files, not_compared
from ..checkpoint.ties import stored_ties
from ..checkpoint.unfinished import find_journals, journal_path
from ..errors import UsageError, boundary, keyword, spelled
from ..neurons.anatomy import read_anatomy
from ..neurons.layout import described
from ..neurons.submodels import part_config, stated_type
from ..options import InspectOptions, Scope, split
from ..patch.lossless import LosslessPatch, form_shares, load_any
from ..patch.overlap import overlap
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_KEY, PATCH_NAME
from ..scoring.scores import SCORES_KEY, Scores
from ..selection.selection import SELECTION_KEY, Selection
from ..sources.hub_errors import AbsentFileError
from ..sources.resolve import Source, is_hub_id, resolve, resolve_file
from ..storage.output_checks import AnyPath
from ..tensors.header import TensorInfo, read_header
from ..text import commas, label, lines, natural_key, percent, plural, printable, size, some
from .inspect_anatomy import anatomy_facts, anatomy_tables
from .summary import summarize

_SHOWN = 40


class Inspection(dict[str, Any]):
    """What `inspect` found: plain values by key. Printed, the facts in a few lines."""

    @property
    def kind(self) -> str:
        """``checkpoint``, ``scores``, ``selection``, ``patch``, or ``patches`` if several were named."""
        return str(self["kind"])

    @property
    def tables(self) -> list[list[list[str]]]:
        """What a person wants to know, as rows of cells; options as ``[[name]]``."""
        if self.get("lossless"):
            return [_lossless_rows(self), _kind_rows(self["weights"])]
        if "anatomies" in self:
            return anatomy_tables(self)
        return _patch_tables(self) if self.kind == "patches" else [_rows(self)]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return dict(self)

    def __str__(self) -> str:
        return lines(spelled("  ".join(row), keyword) for rows in self.tables for row in rows)

    def __repr__(self) -> str:
        return printable(f"<Inspection: {'  '.join(self.tables[0][0])}>")


@boundary
def inspect(
    named: AnyPath | Sequence[AnyPath],
    **options: Unpack[InspectOptions],
) -> Inspection:
    """Tell what a file or folder holds.

    Args:
        named: A checkpoint (file, folder or Hub id), scores, a selection or a patch (file or Hub id); or
            several patches. A Hub repository that holds a patch is that patch.
        anatomy, axis, include, exclude, only: For a checkpoint: what counts as a neuron, as in
            `neftsurgery.diff`; ``all``: ``kinds`` of weights in place of ``tensors``, and the ``anatomies``
            that are offered.

    Returns:
        Inspection: A dict of plain values that prints itself; see `Inspection.kind`. ``tensors`` lists the
            tensors; for several patches, ``overlaps`` says what each two of them have in common.

    Raises:
        UsageError: If there is nothing of that name, or several things are named that are not all patches.
        CorruptFileError: If it is damaged.
    """
    (given,) = split("inspect", options, InspectOptions)
    if not isinstance(named, (str, os.PathLike)):
        if len(named) != 1:
            return Inspection(_patches(named))
        named = named[0]
    return Inspection(_one(named, Scope(**given)))


def _one(named: AnyPath, scope: Scope) -> dict[str, Any]:
    source = _found(named)
    if source.path.is_file():
        metadata = read_header(source.path).metadata
        if PATCH_KEY in metadata:
            return _patch(load_any(source))
        if SCORES_KEY in metadata:
            return _scores(Scores.load(source.path))
        if SELECTION_KEY in metadata:
            return _selection(Selection.load(source.path), os.fspath(named))
    return _checkpoint(Checkpoint.read(source), scope)


def _found(named: AnyPath) -> Source:
    """What to inspect. If a Hub repository holds a patch, nothing else is fetched."""
    if is_hub_id(named):
        try:
            return resolve_file(named, PATCH_NAME)
        except AbsentFileError:  # it is a checkpoint
            pass
    return resolve(named)


def _checkpoint(checkpoint: Checkpoint, scope: Scope) -> dict[str, Any]:
    config, shown = checkpoint.config, dequantized(checkpoint)
    if scope.anatomy == "all":
        return anatomy_facts(shown, scope)
    anatomy = read_anatomy(scope, shown.tensors, config)
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    tensors = [_tensor(t.info, t.axes, t.neurons) | {"kind": t.kind} for t in anatomy.scored]
    quantized = {tensor["name"]: shown.quantized.get(tensor["name"]) for tensor in tensors}
    for tensor in tensors:
        if (weight := quantized[tensor["name"]]) is not None:
            tensor |= {"dtype": weight.layout, "stored_as": weight.describe()}
    tensors += [_tensor(entry.info) | {"reason": entry.reason} for entry in anatomy.listed]
    ties, notes = stored_ties(checkpoint)
    copied = sum(checkpoint.tensors[name].elements for name, same in ties.items() if name != same[0])
    layouts = Counter((weight.layout, weight.unit) for weight in shown.quantized.values())
    aside = {} if checkpoint.is_file else {"left_behind_by_apply": [*map(str, folder_files(checkpoint).left)]}
    return {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "repo": checkpoint.source.repo,
        "revision": checkpoint.source.revision,
        "files": [shard.name for shard in checkpoint.shards],
        "bytes": checkpoint.nbytes,
        "parameters": shown.parameters - copied,
        "dtypes": dict(dtypes.most_common()),
        "quantized": [{"layout": one, "unit": unit, "weights": n} for (one, unit), n in layouts.items()],
        "model_type": stated_type(config) or None,
        "parts": {part.strip("/"): stated_type(part_config(config, part)) for part in checkpoint.parts},
        "unfinished": [str(journal_path(one)) for one in find_journals(checkpoint.source)],
        **aside,
        "anatomy": anatomy.name,
        "neurons": anatomy.neurons,
        "units": anatomy.unit_count,
        "tied": {names[0]: names[1:] for names in ties.values()},
        "not_read": not_compared(checkpoint),
        "warnings": [*anatomy.warnings, *notes, *file_notes(checkpoint)],
        "tensors": _in_order(tensors),
    }


def _tensor(
    info: TensorInfo, axes: Sequence[int] | None = None, neurons: int = 0, of: int | None = None
) -> dict[str, Any]:
    """What is said of a tensor; without ``axes`` nothing of neurons."""
    facts = {"name": info.name, **described(info, axes)}
    if axes is not None:
        facts["neurons"] = neurons
    return facts if of is None else facts | {"of": of}


def _in_order(tensors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layer 2 before layer 10."""
    return sorted(tensors, key=lambda tensor: natural_key(tensor["name"]))


def _patch(patch: Patch | LosslessPatch) -> dict[str, Any]:
    facts = {
        "kind": "patch",
        "name": patch.name,
        "version": patch.manifest["version"],
        "bytes": patch.nbytes,
        "sha256": patch.sha256(),
        "reversible": patch.reversible,
        "base": dict(patch.base),
        "created_by": patch.manifest.get("created_by"),
    }
    if isinstance(patch, Patch):
        tensors = [_tensor(t.info, t.layout.axes, t.count, t.layout.count) for t in patch.tensors.values()]
        return facts | {
            "neurons": patch.neurons,
            "parameters": patch.parameters,
            "groups": [asdict(group) for group in patch.groups],
            "selection": dict(patch.facts),
            "tensors": _in_order(tensors),
        }
    return facts | {
        "lossless": True,
        "tuned_bytes": patch.forward.nbytes,
        "tuned": dict(patch.tuned),
        "files": [file.name for file in patch.forward.files],
        "side_files": [asdict(one) for one in patch.forward.side],
        "not_carried": list(patch.not_carried),
        "forms": patch.forms(),
        "weights": [{"name": kind, **vars(found)} for kind, found in patch.kinds().items()],
        "tensors": [
            _tensor(patch.forward.tensors[name]) | vars(found) for name, found in patch.weights().items()
        ],
    }


def _patches(named: Sequence[AnyPath]) -> dict[str, Any]:
    """Several patches, and what each two of them have in common."""
    if not named:
        raise UsageError("there is nothing to inspect")
    patches = []
    for path in named:
        source = _found(path)
        if not source.path.is_file() or PATCH_KEY not in read_header(source.path).metadata:
            raise UsageError(
                "only patches can be inspected together", file=path, hint="name one thing, or patches only"
            )
        patch = load_any(source)
        if not isinstance(patch, Patch):
            raise UsageError("a lossless patch is inspected by itself: it chooses no neurons", file=path)
        patches.append(patch)
    overlaps = []
    for a, b in combinations(range(len(patches)), 2):
        found = overlap(patches[a], patches[b])
        overlaps.append({"first": a, "second": b, "agree": found.agree, **asdict(found)})
    return {"kind": "patches", "patches": [_patch(patch) for patch in patches], "overlaps": overlaps}


def _selection(selection: Selection, name: str) -> dict[str, Any]:
    return {
        "kind": "selection",
        "name": name,
        "neurons": selection.neurons,
        "parameters": selection.parameters,
        "selection": dict(selection.facts),
        "tensors": _in_order(_tensor(c.info, c.layout.axes, len(c.index), c.layout.count) for c in selection),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    known = ("base", "tuned", "only_in_base", "only_in_tuned", "differing", "seed")
    return {
        "kind": "scores",
        "name": str(scores.path),
        "score": scores.score,
        "anatomy": scores.anatomy,
        "neurons": scores.neurons,
        "units": scores.units,
        "parameters": scores.parameters,
        **{key: scores.facts[key] for key in known if key in scores.facts},
        **summarize(scores).describe(),
        "tensors": _in_order(_tensor(t.info, t.layout.axes, t.layout.count) for t in scores.tensors.values()),
    }


def _lossless_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    files = [*facts["files"], *(one["name"] for one in facts["side_files"])]
    changed, elements = (sum(kind[key] for kind in facts["weights"]) for key in ("changed", "elements"))
    return [
        ["lossless patch", str(facts["name"])],
        ["size", f"{size(facts['bytes'])} for {size(facts['tuned_bytes'])} of weights"],
        ["sha256", facts["sha256"]],
        ["files", some(files, _SHOWN)],
        *([["not carried", some(facts["not_carried"], _SHOWN)]] if facts["not_carried"] else []),
        ["reversible", "yes" if facts["reversible"] else "no: revert needs [[base]]"],
        *_origin(facts),
        ["changed", f"{percent(changed / max(1, elements))} of {plural(elements, 'element')}"],
        ["stored as", form_shares({form: one["bytes"] for form, one in facts["forms"].items()})],
    ]


def _kind_rows(kinds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """How much of each kind of weight changed, and how it is stored."""
    rows = [["kind of weight", "tensors", "elements", "changed", "tuned", "patch", "share", "stored as"]]
    for kind in kinds[:_SHOWN]:
        changed = kind["changed"] / max(1, kind["elements"])
        stored = kind["code"] / max(1, kind["tuned_bytes"])
        counts = commas(kind["tensors"]), commas(kind["elements"]), percent(changed)
        sizes = size(kind["tuned_bytes"]), size(kind["code"]), percent(stored)
        rows.append([label(kind["name"]), *counts, *sizes, form_shares(kind["forms"])])
    return rows + [[f"and {len(kinds) - _SHOWN:,} more", *[""] * 7]] * (len(kinds) > _SHOWN)


def _rows(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = [[facts["kind"], str(facts["name"])]]
    if "files" in facts:
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in facts["dtypes"].items())
        rows += [
            ["weights", f"{plural(len(facts['files']), 'file')}, {size(facts['bytes'])}: {dtypes}"],
            ["model type", str(facts["model_type"] or "unknown: no config.json beside the weights")],
        ]
        parts = [f"{part or '.'} ({kind})" if kind else part for part, kind in facts["parts"].items()]
        rows += [["parts", some(parts, len(parts))]] if parts else []
    elif "bytes" in facts:
        rows.append(["size", size(facts["bytes"])])
    rows += [["sha256", facts["sha256"]]] if "sha256" in facts else []
    if "parameters" in facts:
        rows.append(["parameters", commas(facts["parameters"])])
    for entry in facts.get("quantized", ()):
        rows.append(
            ["quantized", f"{plural(entry['weights'], 'weight')} in {entry['layout']}: {entry['unit']}"]
        )
    if facts.get("groups"):
        rows.append(["quantized", f"{plural(len(facts['groups']), 'weight')}: codes, with their scales"])
    units = f" in {commas(facts['units'])} units" if facts.get("units") else ""
    rows.append(["neurons", commas(facts["neurons"]) + units])
    rows += [[key, str(facts[key])] for key in ("anatomy", "score") if key in facts]
    if facts.get("tied"):
        tied = [f"{name} is {', '.join(copies)}" for name, copies in facts["tied"].items()]
        rows.append(["tied", some(tied)])
    if facts.get("not_read"):
        rows.append(["not read", some(facts["not_read"])])
    if "reversible" in facts:
        rows.append(["reversible", "yes" if facts["reversible"] else "no: revert needs [[base]]"])
    return rows + _origin(facts)


def _patch_tables(facts: Mapping[str, Any]) -> list[list[list[str]]]:
    """Several patches, numbered, and their overlaps."""
    patches = [
        f"{patch['name']}: {plural(patch['neurons'], 'neuron')} of "
        f"{plural(len(patch['tensors']), 'tensor')}, {size(patch['bytes'])}"
        for patch in facts["patches"]
    ]
    overlaps = [
        [
            f"{found['first'] + 1} and {found['second'] + 1}",
            f"{plural(found['neurons'], 'neuron')} in common, in {commas(len(found['shared']))} of the "
            f"{plural(len(found['tensors']), 'tensor')} that both touch",
            _bases(found),
        ]
        for found in facts["overlaps"]
    ]
    return [[[str(number), patch] for number, patch in enumerate(patches, 1)], overlaps]


def _bases(found: Mapping[str, Any]) -> str:
    """What an overlap says of the two bases."""
    if found["unfit"]:
        return f"for different models: {found['unfit'][0][:120]} has another shape or dtype"
    if found["foreign"]:
        return f"different bases: {plural(found['foreign'], 'neuron')} in common were not the same"
    if found["same_base"] is False:
        return "different bases: their fingerprints differ"
    said = "one base" if found["same_base"] else "nothing says that the bases differ, nor that they do not"
    if found["crossing"]:
        said += f"; rows and columns cross in {plural(len(found['crossing']), 'tensor')}"
    return said


def _origin(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for side in ("base", "tuned"):
        if isinstance(found := facts.get(side), dict) and found:
            known = dict.fromkeys(str(found[key]) for key in ("repo", "revision", "name") if found.get(key))
            rows.append([side, f"{' '.join(known)}  {found.get('fingerprint') or ''}".strip()])
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
    """From which patches a patch was merged, by its manifest, which may hold any JSON."""
    parts = merged.get("patches")
    parts = parts if isinstance(parts, list) else []
    known = [(part.get("name") or "?", part.get("revision")) for part in parts if isinstance(part, dict)]
    names = ["@".join(str(one) for one in name if one) for name in known]
    return f"from {', '.join(names)} ({merged.get('on_overlap')})"
