"""Which tensors of a checkpoint hold neurons, and along which axes: by names, shapes and the config alone.

The family table (`neftsurgery.neurons.families`) says what a name means; a shape never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from ..errors import MismatchError, UsageError
from ..options import AxisOption, PatternOptions, Scope
from ..tensors.arrays import Mask
from ..tensors.header import TensorInfo
from .families import FeedForward
from .layout import Layout
from .quantized import quantization_reasons
from .submodels import Role, Submodel, Submodels, part_config, split_part, stated_type
from .tensor_names import (
    COLUMNS,
    UNKNOWN_EXPERTS,
    UNKNOWN_LAYER,
    NameReading,
    bias_of,
    block_key,
    layer_and_kind,
    matching,
    member_axes,
    name_pattern,
    read_name,
    split_layer,
)
from .units import CountedSlice, UnitMap, UnitSpan, unit_spans, up_slice

ANATOMIES = ("rows", "ffn", "units")
_NO_ROLE = {"ffn": "not an up or down projection of a feed-forward block", "units": "not part of a unit"}


@dataclass(frozen=True, slots=True)
class NeuronTensor:
    """One tensor that holds neurons."""

    info: TensorInfo
    axes: tuple[int, ...]  # the neuron axes, ascending
    layer: str  # its pool: the name up to its first number, ``model.layers.3``; empty outside the layers
    # The rest of the name, without ``.weight``: ``mlp.up_proj``. Numbers of experts become ``*``.
    kind: str
    bias: str | None = None  # the tensor with one element per neuron that is added to their outputs
    units: UnitMap | None = None  # of the anatomy ``units``: the unit of every neuron
    part: CountedSlice | None = None  # the neurons that count; None: all
    tied: str = ""  # of units that are tied to their place: what else holds something of each
    by_columns: bool = False  # whether its neurons are columns, which no bias is added to

    @property
    def layout(self) -> Layout:
        """Where the neurons lie in the tensor."""
        return Layout.of(self.info.shape, self.axes)

    @property
    def neurons(self) -> int:
        """How many neurons count."""
        return self.layout.count if self.part is None else self.part.count

    def counted(self) -> Mask:
        """Whether each neuron counts, bool ``[n]``."""
        return np.ones(self.layout.count, np.bool_) if self.part is None else self.part.mask()


@dataclass(frozen=True, slots=True)
class Listed:
    """A tensor that is not scored, and why."""

    info: TensorInfo
    reason: str
    # The neuron axes, if its neurons have one element each: all axes of a bias or norm. Such neurons have no
    # direction to score, but they can change. None where no neuron can be chosen.
    axes: tuple[int, ...] | None = None
    included: bool = False  # whether ``include`` names it


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Every tensor of a checkpoint: either scored, or listed with the reason. Both sorted by code points."""

    name: str  # one of `ANATOMIES`
    scored: tuple[NeuronTensor, ...]
    listed: tuple[Listed, ...]
    warnings: tuple[str, ...] = ()
    unit_count: int = 0  # 0 unless the anatomy is ``units``

    @property
    def neurons(self) -> int:
        """How many neurons are scored."""
        return sum(tensor.neurons for tensor in self.scored)


def read_anatomy(
    scope: Scope | str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    **patterns: Unpack[PatternOptions],
) -> Anatomy:
    """Decide for every tensor whether it holds neurons, and along which axes.

    The scope may be an anatomy, with ``patterns``. ``rows`` are output units of weights; ``ffn`` the up rows
    and down columns of feed-forward blocks, each on its own; ``units`` feed-forward and attention units,
    whose parts lie in several tensors. ``axis`` overrides the family table; the others are patterns of
    tensors to add, leave out, or look at alone. Raises a `UsageError` for what no tensor has, and a
    `MismatchError` where ``ffn`` or ``units`` cannot be told.
    """
    scope = Scope(scope, **patterns) if isinstance(scope, str) else scope
    if (name := scope.anatomy) not in ANATOMIES:
        raise UsageError(f"there is no anatomy {name!r}", hint=f"known ones: {', '.join(ANATOMIES)}")
    submodels = Submodels.of(config)
    if name != "rows" and not submodels.known:
        raise MismatchError(
            f"the anatomy {name} needs a known architecture, and {_unknown(config)}",
            hint="the anatomy rows works for every model",
        )
    axes = _overrides(scope.axis, tensors)
    included = matching(scope.include, tensors, option="include")
    excluded = matching(scope.exclude, tensors)
    permitted = matching(scope.only, tensors, option="only") if scope.only else None
    return _Reader(name, tensors, submodels, config, axes, included - excluded, excluded, permitted).read()


@dataclass
class _Reader:
    """Reads one checkpoint. Names that differ only in numbers are read once, tensors of all layers too."""

    name: str
    tensors: Mapping[str, TensorInfo]
    submodels: Submodels
    config: Mapping[str, Any] | None
    axes: Mapping[str, tuple[int, ...]]
    included: set[str]
    excluded: set[str]
    only: set[str] | None

    def __post_init__(self) -> None:
        self.quantized = quantization_reasons(self.tensors, self.config)
        self.readings: dict[tuple[tuple[str, ...], int], NameReading] = {}
        self.verdicts: dict[tuple[object, ...], NeuronTensor | Listed] = {}
        self.blocks: dict[str, tuple[str, str]] = {}  # what the tensors of one block of units share
        self.assumed: dict[tuple[str, str], None] = {}  # a part of the folder, and a type of its submodels

    def read(self) -> Anatomy:
        found = [self.judge(self.tensors[name]) for name in sorted(self.tensors)]
        scored = [tensor for tensor in found if isinstance(tensor, NeuronTensor)]
        listed = [tensor for tensor in found if isinstance(tensor, Listed)]
        count = 0
        if self.name == "units":
            scored, count = _numbered(scored, self.blocks)
        warnings = tuple(dict.fromkeys(self.warnings(listed)))
        return Anatomy(self.name, tuple(scored), tuple(listed), warnings, count)

    def judge(self, info: TensorInfo) -> NeuronTensor | Listed:
        """Whether ``info`` is scored, and how."""
        name = info.name
        before, layer, rest = split_layer(name)
        before = before if "." in rest else layer  # as in `name_pattern`
        asked = name in self.included, name in self.excluded, self.only is None or name in self.only
        key = (before, rest, info.dtype, info.shape, asked, self.quantized.get(name), self.axes.get(name))
        verdict = self.verdicts.get(key)
        if verdict is None or self.name == "units":
            verdict = self.verdicts[key] = self.decide(info)
        if isinstance(verdict, Listed):
            return Listed(info, verdict.reason, verdict.axes, verdict.included)
        bias = None if verdict.by_columns else bias_of(info, verdict.axes, self.tensors)
        return replace(verdict, info=info, layer=layer, bias=bias)

    def decide(self, info: TensorInfo) -> NeuronTensor | Listed:
        """As `judge`, without its bias."""
        included = info.name in self.included
        barred = self.barred(info)
        if barred:
            return Listed(info, barred, None, included)
        part, rest = split_part(info.name)
        parts = [*([part] if part else []), *rest.split(".")]
        reading = self.reading(parts, len(info.shape))
        stated = None if reading.reason == "bias" else self.axes.get(info.name)
        if len(info.shape) < 2 or reading.reason in ("bias", "norm"):
            every = tuple(range(len(info.shape)))
            return Listed(info, reading.reason or "one element wide", every, included)
        if reading.reason and not included and not (reading.needs_axis and stated):
            return Listed(info, reading.reason, None, False)
        role = self.member(reading)
        axes = stated or (reading.axes if role is None else member_axes(role, reading))
        if axes is None:
            return Listed(info, reading.reason, None, included)
        if self.name != "rows" and role is None and not included:
            return Listed(info, _NO_ROLE[self.name])
        if Layout.of(info.shape, axes).width == 1:
            return Listed(info, "one element wide", axes, included)
        if reading.assumed and not stated:
            main = reading.submodel is self.submodels.towers.get(part, self.submodels).main
            self.assumed.setdefault((part, "" if main else reading.submodel.model_type))
        return self.placed(info, parts, axes, reading.submodel, role)

    def barred(self, info: TensorInfo) -> str:
        """Why no neuron of ``info`` can be chosen at all, "" if some can."""
        if info.name in self.quantized:
            return self.quantized[info.name]
        if info.type.kind != "float":
            return info.type.kind
        if info.elements == 0:
            return "no elements"
        if info.name in self.excluded:
            return "excluded"
        return "" if self.only is None or info.name in self.only else "not among those asked for"

    def reading(self, parts: Sequence[str], ndim: int) -> NameReading:
        """What a name says of a tensor of ``ndim`` axes."""
        pattern = name_pattern(parts)
        key = (pattern, ndim)
        if key not in self.readings:
            self.readings[key] = read_name(pattern, ndim, self.submodels.of_name(pattern))
        return self.readings[key]

    def member(self, reading: NameReading) -> Role | None:
        """The role of a tensor in a block of this anatomy, if it has one."""
        role = reading.role
        if role is None or role.block is None or self.name == "rows":
            return None
        if self.name == "ffn" and role.member not in ("up", "down", "gate_up"):
            return None
        return role

    def placed(
        self,
        info: TensorInfo,
        parts: Sequence[str],
        axes: tuple[int, ...],
        submodel: Submodel,
        role: Role | None,
    ) -> NeuronTensor | Listed:
        """The tensor with its layer, and its part or its share of a block."""
        tied = role.block.tied if role and role.block else ""
        columns = role is not None and role.member in COLUMNS
        tensor = NeuronTensor(info, axes, *layer_and_kind(info.name), tied=tied, by_columns=columns)
        inner = info.shape[axes[-1]]
        outer = math.prod(info.shape[axis] for axis in axes[:-1])
        if self.name == "units":
            if role is None:
                self.blocks[info.name] = ("", info.name)
                return replace(tensor, units=UnitMap(0, outer, inner, (UnitSpan(0, inner, 1),)))
            heads = None if isinstance(role.block, FeedForward) else submodel.heads(parts)
            try:
                spans = unit_spans(role, inner, heads)
            except ValueError as error:
                return Listed(info, f"not part of a unit: {error}")
            self.blocks[info.name] = block_key(parts, role)
            return replace(tensor, units=UnitMap(0, outer, max(s.first + s.units for s in spans), spans))
        if role is not None:
            try:
                return replace(tensor, part=up_slice(role, outer, inner))
            except ValueError as error:
                return Listed(info, f"not up and gate: {error}")
        return tensor

    def warnings(self, listed: Iterable[Listed]) -> Iterable[str]:
        """What the user should know about this anatomy."""
        for part in dict.fromkeys(part for part, _ in self.assumed):
            types = [model_type for one, model_type in self.assumed if one == part]
            yield (
                f"{_unknown(part_config(self.config, part), part, types)}: weights count as [out, in, ...]; "
                "where that is wrong, give the axes with [[axis=...]]"
            )
        for start, text in (
            ("quantized: ", "quantized tensors and their scales are left out"),
            (
                UNKNOWN_EXPERTS,
                "tensors of experts are left out, as their axes are not known: give them with [[axis=...]]",
            ),
            (UNKNOWN_LAYER, "weights are left out, as their axes are not known: give them with [[axis=...]]"),
            ("not part of a unit: ", "tensors are in no unit; check that config.json belongs to them"),
        ):
            found = [entry for entry in listed if entry.reason.startswith(start)]
            if found:
                yield f"{len(found)} {text} (first: {found[0].info.name}, {found[0].reason})"
        empty = sum(entry.reason == "no elements" for entry in listed)
        if 2 * empty > len(self.tensors):
            yield f"{empty} tensors have no elements, as DeepSpeed ZeRO-3 and FSDP leave them"
        # A config that belongs to other weights: nothing in them has the width that it states.
        width = self.submodels.main.config.get("hidden_size") if self.submodels.main.families else None
        shapes = [info.shape for info in self.tensors.values() if len(info.shape) > 1]
        if type(width) is int and len(shapes) > 1 and not any(width in shape for shape in shapes):
            yield (
                f"config.json states a hidden_size of {width}, and no weight has an axis of that size: "
                "check that it belongs to these weights"
            )
        for submodel in self.submodels.all if self.name == "units" else ():
            kinds = [{type(block) for block in family.blocks} for family in submodel.families]
            if {FeedForward} in kinds:
                yield f"attention of {submodel.model_type} has no units: only feed-forward ones are scored"


def _numbered(
    scored: Sequence[NeuronTensor], keys: Mapping[str, tuple[str, str]]
) -> tuple[list[NeuronTensor], int]:
    """Give every unit its id: by the first tensor of its block, then by the order of its neurons."""
    blocks: dict[tuple[str, str], tuple[UnitMap, str]] = {}
    numbered: list[NeuronTensor] = []
    count = 0
    for tensor in scored:
        units, key = tensor.units, keys[tensor.info.name]
        assert units is not None
        if key not in blocks:
            blocks[key] = (replace(units, base=count), tensor.info.name)
            count += units.outer * units.units
        block, first = blocks[key]
        if (block.outer, block.units) != (units.outer, units.units):
            raise MismatchError(
                f"the units of this block do not match those of {first}",
                tensor=tensor.info.name,
                expected=block.outer * block.units,
                found=units.outer * units.units,
                hint="the anatomy rows has no blocks: use it",
            )
        numbered.append(replace(tensor, units=replace(units, base=block.base)))
    return numbered, count


def _overrides(axis: AxisOption, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The axes that ``axis`` states, by tensor; the last match wins."""
    stated: dict[str, tuple[int, ...]] = {}
    for glob, given in axis.items() if isinstance(axis, Mapping) else axis:
        axes = (given,) if isinstance(given, int) else tuple(given)
        if not axes or list(axes) != sorted(set(axes)) or any(type(n) is not int or n < 0 for n in axes):
            raise UsageError(f"[[axis]] {glob}: {list(axes)} are not axes: they count from 0 and must ascend")
        for name in matching((glob,), tensors, option="axis"):
            shape = tensors[name].shape
            if len(shape) < 2 or name.endswith("bias"):
                continue
            if axes[-1] >= len(shape):
                raise UsageError(
                    f"[[axis]] {glob}: there is no axis {axes[-1]} in its shape {list(shape)}", tensor=name
                )
            stated[name] = axes
    return stated


def _unknown(config: Mapping[str, Any] | None, part: str = "", types: Sequence[str] = ("",)) -> str:
    """Says that the model in ``part``, or its submodels of these types, are not known."""
    if not config:
        return f"there is no {part}config.json to say what the model is"
    stated = (one or config.get("model_type") for one in types)
    named = [repr(model_type[:80]) for model_type in stated if isinstance(model_type, str) and model_type]
    if named:
        return f"the model_type {' and '.join(named)} {f'of {part} ' if part else ''}is not known"
    other = stated_type(config)
    return f"{part}config.json names no model_type" + (f", and {other!r} is not known" if other else "")
