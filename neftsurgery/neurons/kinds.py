"""What was understood of a checkpoint, per kind of weight: names that differ only in numbers are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tensors.header import TensorInfo
from .anatomy import Anatomy
from .submodels import Submodels, split_part
from .tensor_names import COLUMNS, layer_and_kind, name_pattern, read_name


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
