"""Which unit each neuron of a tensor belongs to, and which neurons of a tensor count: as formulas.

There can be hundreds of millions of neurons: an array of them is built for one tensor at a time, on demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .families import Attention, FeedForward
from .submodels import Heads, Role


@dataclass(frozen=True, slots=True)
class CountedSlice:
    """The neurons of a tensor that count: positions ``start:stop:step`` of its last neuron axis."""

    outer: int  # product of the sizes of the other neuron axes: the experts of a stacked tensor, else 1
    inner: int  # size of the last neuron axis
    start: int
    stop: int
    step: int = 1

    @property
    def count(self) -> int:
        """How many neurons count."""
        return self.outer * len(range(self.inner)[self.start : self.stop : self.step])

    def mask(self) -> NDArray[np.bool_]:
        """Per neuron whether it counts, bool ``[outer * inner]``."""
        mask = np.zeros((self.outer, self.inner), dtype=np.bool_)
        mask[:, self.start : self.stop : self.step] = True
        return mask.reshape(-1)


@dataclass(frozen=True, slots=True)
class UnitSpan:
    """A range of the last neuron axis: ``repeat`` neurons of each of ``units`` units, from unit ``first``."""

    first: int
    units: int
    repeat: int


@dataclass(frozen=True, slots=True)
class UnitMap:
    """The model-wide unit id of every neuron of one tensor."""

    base: int  # the id of the first unit of the block
    outer: int  # as in `CountedSlice`
    units: int  # of the block per step of the outer axes
    spans: tuple[UnitSpan, ...]  # the ranges of the last neuron axis, in order

    def __len__(self) -> int:
        return self.outer * sum(span.units * span.repeat for span in self.spans)

    def ids(self) -> NDArray[np.int64]:
        """The unit of each neuron, int64 ``[len(self)]``; built at each call, 8 bytes per neuron."""
        inner = np.concatenate(
            [np.repeat(np.arange(s.first, s.first + s.units, dtype=np.int64), s.repeat) for s in self.spans]
        )
        starts = self.base + np.arange(self.outer, dtype=np.int64) * self.units
        ids: NDArray[np.int64] = (starts[:, None] + inner).reshape(-1)
        return ids


def up_slice(role: Role, outer: int, inner: int) -> CountedSlice | None:
    """Which neurons are up rows or down columns, None for all; a ValueError if fused rows do not halve."""
    if role.member != "gate_up" or not isinstance(role.block, FeedForward):
        return None
    half = _divide(inner, 2, "gate and up")
    swapped = role.block.fused.startswith("swapped")
    if role.block.fused.endswith("pairs"):
        return CountedSlice(outer, inner, int(not swapped), inner, 2)
    return CountedSlice(outer, inner, 0, half) if swapped else CountedSlice(outer, inner, half, inner)


def unit_spans(role: Role, inner: int, heads: Heads | None) -> tuple[UnitSpan, ...]:
    """How the ``inner`` neurons of a member divide among its units; a ValueError says why they do not."""
    if isinstance(role.block, FeedForward):
        if role.member != "gate_up":
            return (UnitSpan(0, inner, 1),)
        units = _divide(inner, 2, "gate and up")
        if role.block.fused.endswith("pairs"):
            return (UnitSpan(0, units, 2),)
        return (UnitSpan(0, units, 1), UnitSpan(0, units, 1))
    if heads is None:
        raise ValueError("the config does not say how many heads attention has")
    if role.member in ("q", "o"):
        return (UnitSpan(0, heads.kv, _divide(inner, heads.query, "query heads") * heads.query // heads.kv),)
    if role.member in ("k", "v"):
        return (UnitSpan(0, heads.kv, _divide(inner, heads.kv, "key/value heads")),)
    width = _divide(inner, heads.query + 2 * heads.kv, "heads")
    group = width * heads.query // heads.kv
    if not isinstance(role.block, Attention) or role.block.fused == "sections":
        return (UnitSpan(0, heads.kv, group), *(UnitSpan(0, heads.kv, width) for _ in "kv"))
    if role.block.fused == "heads":
        return (UnitSpan(0, heads.kv, group + 2 * width),)
    part = _divide(heads.kv, 4, "quarters")
    return tuple(UnitSpan(quarter * part, part, width) for quarter in range(4) for _ in "qvk")


def _divide(neurons: int, parts: int, what: str) -> int:
    if neurons % parts:
        raise ValueError(f"{neurons} neurons do not divide into {parts} {what}")
    return neurons // parts
