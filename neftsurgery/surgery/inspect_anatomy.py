"""What was understood of a checkpoint: its parts, its kinds of weight, and which anatomies it offers.

Tensors whose names differ only in numbers are of one kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError
from ..neurons.anatomy import ANATOMIES, Anatomy, read_anatomy
from ..neurons.submodels import Submodel, Submodels, split_part, stated_type
from ..neurons.tensor_names import COLUMNS, layer_and_kind, name_pattern, read_name
from ..options import Scope
from ..tensors.header import TensorInfo
from ..text import commas, label, natural_key, plural, some


@dataclass
class WeightKind:
    """Tensors that are read alike."""

    name: str  # whole, with ``*`` for numbers
    part: str  # the model type that the config of their part states; empty if it states none
    role: str  # such as ``up`` or ``embedding``; ``weight`` for one in no block
    axes: tuple[int, ...] | None  # of `rows`; None if they are left out
    reason: str  # why they are left out
    tied: str  # what else holds something of each unit, and so ties it to its place
    by_columns: bool  # whether units take columns of it
    tensors: int = 0
    layers: set[str] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        facts = {
            "name": self.name,
            "tensors": self.tensors,
            "layers": len(self.layers - {""}),
            "shapes": sorted(map(list, self.shapes)),
            "part": self.part,
        }
        if self.axes is None:
            return facts | {"reason": self.reason}
        read = {"role": self.role, "by_columns": self.by_columns, "tied_by": self.tied.split()}
        return facts | {"neuron_axes": list(self.axes), **read}


def weight_kinds(rows: Anatomy, config: Mapping[str, Any] | None) -> list[WeightKind]:
    """The kinds of all tensors of two axes or more, as the anatomy ``rows`` has them, in its order."""
    submodels = Submodels.of(config)
    found: dict[tuple[object, ...], WeightKind] = {}
    entries: list[tuple[TensorInfo, tuple[int, ...] | None, str]] = [
        *((tensor.info, tensor.axes, "") for tensor in rows.scored),
        *((entry.info, None, entry.reason) for entry in rows.listed),
    ]
    for info, axes, reason in entries:
        if len(info.shape) < 2:
            continue
        folder, rest = split_part(info.name)
        parts = [*([folder] if folder else []), *rest.split(".")]
        pattern = name_pattern(parts)
        key = (pattern, len(info.shape), axes, reason)
        if key not in found:
            reading = read_name(pattern, len(info.shape), submodels.of_name(pattern))
            role, block = reading.role, reading.role.block if reading.role else None
            member = role.member if role and block else ""
            expert = "expert " if block and ("E" in block.order or "experts" in pattern) else ""
            found[key] = WeightKind(
                ".".join(pattern).replace("/.", "/", 1),
                reading.submodel.model_type,
                reason if reason else f"{expert}{member}" if member else "weight",
                axes,
                reason,
                block.tied if block else "",
                member in COLUMNS,
            )
        kind = found[key]
        kind.tensors += 1
        kind.shapes.add(info.shape)
        kind.layers.add(layer_and_kind(info.name)[0])
    return list(found.values())


def anatomy_facts(checkpoint: Checkpoint, scope: Scope) -> dict[str, Any]:
    """Plain values: ``parts``, ``anatomies`` with counts or the reason, and ``kinds``."""
    rows = read_anatomy(replace(scope, anatomy="rows"), checkpoint.tensors, checkpoint.config)
    kinds = weight_kinds(rows, checkpoint.config)
    warnings = dict.fromkeys(rows.warnings)
    anatomies = {"rows": _counts(rows)}
    for name in ANATOMIES[1:]:
        try:
            found = read_anatomy(replace(scope, anatomy=name), checkpoint.tensors, checkpoint.config)
        except MismatchError as error:
            anatomies[name] = {"why_not": error.what}
            continue
        warnings |= dict.fromkeys(found.warnings)
        none = "no feed-forward block" if name == "ffn" else "no feed-forward or attention block"
        anatomies[name] = _counts(found) if found.scored else {"why_not": f"{none} is known in this model"}
    return {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "anatomy": "all",
        "model_type": stated_type(checkpoint.config) or None,
        "parts": _parts(Submodels.of(checkpoint.config), kinds),
        "anatomies": anatomies,
        "kinds": [kind.describe() for kind in sorted(kinds, key=lambda kind: natural_key(kind.name))],
        "warnings": list(warnings),
    }


def _counts(anatomy: Anatomy) -> dict[str, Any]:
    units = {"units": anatomy.unit_count} if anatomy.unit_count else {}
    return {"tensors": len(anatomy.scored), "neurons": anatomy.neurons, **units}


def _parts(submodels: Submodels, kinds: list[WeightKind]) -> list[dict[str, Any]]:
    """The parts that have tensors: what in a name tells each, "" for what no name tells."""
    used = {part for kind in kinds for part in kind.name.replace("/", "/.").split(".")}
    names: dict[tuple[str, bool], list[str]] = {}
    for name, submodel in (("", submodels.main), *_named(submodels)):
        if submodel.model_type in {kind.part for kind in kinds} and (name in used or not name):
            names.setdefault((submodel.model_type, bool(submodel.families)), []).append(name)
    return [
        {"names": sorted(set(found)), "model_type": model_type, "known": known}
        for (model_type, known), found in names.items()
    ]


def _named(submodels: Submodels) -> Iterator[tuple[str, Submodel]]:
    for name, tower in submodels.towers.items():
        yield name, tower.main
        yield from _named(tower)


def anatomy_tables(facts: Mapping[str, Any]) -> list[list[list[str]]]:
    """The same for people: an overview, and a row for each kind of weight."""
    rows = [[facts["kind"], str(facts["name"])], ["model type", str(facts["model_type"] or "not stated")]]
    for part in facts["parts"]:
        told = f", by {some([name for name in part['names'] if name])}" if any(part["names"]) else ""
        known = "" if part["known"] else ": not known"
        rows.append(["part", f"{part['model_type'] or 'of no stated type'}{known}{told}"])
    for name, counts in facts["anatomies"].items():
        rows.append([name, _offered(counts)])
    left = Counter[str]()
    for kind in facts["kinds"]:
        if "reason" in kind:
            left[kind["reason"]] += kind["tensors"]
    rows.append(["left out", some([f"{reason} ({commas(n)})" for reason, n in left.most_common()], 8)])
    ties: dict[str, list[str]] = {}
    for kind in facts["kinds"]:
        if kind.get("tied_by"):
            ties.setdefault(", ".join(kind["tied_by"]), []).append(kind["name"])
    rows += [["tied", f"units of {some(names)} to their place, by {by}"] for by, names in ties.items()]
    header = ["kind of weight", "tensors", "shape", "neuron axes", "role", "part"]
    return [rows, [header, *map(_row, facts["kinds"])]]


def _offered(counts: Mapping[str, Any]) -> str:
    if "why_not" in counts:
        return f"not offered: {counts['why_not']}"
    what = f"{plural(counts['neurons'], 'neuron')} of {plural(counts['tensors'], 'tensor')}"
    return f"{plural(counts['units'], 'unit')}, {what}" if "units" in counts else what


def _row(kind: Mapping[str, Any]) -> list[str]:
    first, *others = kind["shapes"]
    shape = f"{first}" + (f" and {len(others)} more" if others else "")
    axes = ", ".join(map(str, kind.get("neuron_axes", ()))) or "-"
    columns = " (units take columns)" if kind.get("by_columns") else ""
    said = f"left out: {kind['reason']}" if "reason" in kind else kind["role"] + columns
    return [label(kind["name"], 90), commas(kind["tensors"]), shape, axes, said, kind["part"] or "-"]
