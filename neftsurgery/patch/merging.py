"""Vectors of one neuron from several patches made one: arithmetic on blocks of rows, nothing else.

``sum`` and ``mean`` are task arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR
2023) on neurons; the mean of clients' patches is federated averaging (McMahan et al., AISTATS 2017).
``ties`` is TIES-Merging (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
NeurIPS 2023): of every patch's differences only the largest are kept, each element elects the sign
with the larger sum, and the differences of that sign are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..neurons.vectors import find
from ..tensors.arrays import Float32Array, Float64Array, Int64Array, Mask, RawBytes
from ..tensors.floats import narrow, widen

#: What may be done where patches overlap.
POLICIES: Final = ("error", "first", "last", "mean", "sum", "ties")
#: Those that compute with values.
ARITHMETIC: Final = ("mean", "sum", "ties")
#: The share of each patch's differences that ``ties`` keeps, as in the paper.
DENSITY: Final = 0.2

_BATCH_BYTES = 256 << 10  # of each patch, computed with at once: float64 takes up to eight times as much


@dataclass(frozen=True, slots=True)
class Part:
    """One patch's vectors in a block."""

    slots: Int64Array  # which vectors of the block they are, ascending
    values: RawBytes  # ``[len(slots), width * itemsize]``
    weight: float = 1.0
    least: float = 0.0  # for ``ties``: smaller differences are dropped


def merge_rows(policy: str, dtype: str, parts: Sequence[Part], base: RawBytes | None, count: int) -> RawBytes:
    """The merged vectors of a block of ``count`` neurons, each held by at least one part.

    A neuron that one part alone holds keeps that part's bytes, unless ``sum`` scales it. The policy ``error``
    takes it that no two parts overlap. ``sum`` and ``ties`` need ``base``, the replaced vectors as bytes
    ``[count, width * itemsize]``. Whatever is computed needs a ``dtype`` of `tensors.floats.FLOATS`.
    """
    out = np.empty((count, parts[0].values.shape[1]), np.uint8)
    for part in parts if policy != "first" else reversed(parts):
        out[part.slots] = part.values
    if policy in ARITHMETIC:
        computed = _computed(policy, parts, count)
        for batch in _batches(len(computed), out.shape[1], _BATCH_BYTES):
            rows = computed[batch]
            here = [_picked(part, rows, dtype) for part in parts]
            old = None if base is None else widen(base[rows], dtype)
            out[rows] = narrow(_merged(policy, here, old), dtype)
    return out


def _computed(policy: str, parts: Sequence[Part], count: int) -> Int64Array:
    """The vectors that several parts hold, or that a weight scales."""
    holders = np.zeros(count, np.int64)
    for part in parts:
        holders[part.slots] += 2 if policy == "sum" and part.weight != 1 else 1
    return np.flatnonzero(holders > 1)


def _batches(count: int, row_bytes: int, batch_bytes: int) -> Iterator[slice]:
    step = max(1, batch_bytes // max(1, row_bytes))
    for start in range(0, count, step):
        yield slice(start, start + step)


@dataclass(frozen=True, slots=True)
class _Picked:
    """A part's values among some vectors: those where ``held``."""

    held: Mask
    values: Float64Array
    weight: float
    least: float

    def differences(self, base: Float64Array) -> Float64Array:
        """Weightless differences from ``base``; 0 where nothing is held."""
        found = np.zeros_like(base)
        found[self.held] = self.values - base[self.held]
        return found


def _picked(part: Part, rows: Int64Array, dtype: str) -> _Picked:
    slot, held = find(part.slots, rows)
    return _Picked(held, widen(part.values[slot[held]], dtype), part.weight, part.least)


def _merged(policy: str, parts: Sequence[_Picked], base: Float64Array | None) -> Float64Array:
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf of the patches stay what they are
        if policy == "mean":
            return _mean(parts)
        assert base is not None  # these two are refused without it
        steps = (part.weight * part.differences(base) for part in parts)
        return base + (sum(steps, np.zeros_like(base)) if policy == "sum" else _ties(parts, base))


def _mean(parts: Sequence[_Picked]) -> Float64Array:
    """The weighted mean of the new values, which is the base plus that of the differences."""
    start = np.empty((len(parts[0].held), parts[0].values.shape[1]))
    for part in reversed(parts):
        start[part.held] = part.values
    total, weight = np.zeros_like(start), np.zeros((len(start), 1))
    for part in parts:
        # From the first of the values, so that the mean of equal ones is exactly that, infinite ones too.
        anchor = start[part.held]
        total[part.held] += part.weight * np.where(part.values == anchor, 0.0, part.values - anchor)
        weight[part.held] += part.weight
    mean: Float64Array = start + total / weight
    return mean


def _ties(parts: Sequence[_Picked], base: Float64Array) -> Float64Array:
    trimmed = []
    for part in parts:
        difference = part.differences(base)
        trimmed.append((part.weight, np.where(_magnitude(difference) < part.least, 0.0, difference)))
    elected = np.sign(sum(weight * difference for weight, difference in trimmed))
    total, share = np.zeros_like(base), np.zeros_like(base)
    for weight, difference in trimmed:
        agrees = (np.sign(difference) == elected) & (difference != 0)
        total += np.where(agrees, weight * difference, 0.0)
        share += np.where(agrees, weight, 0.0)
    total /= np.where(share > 0, share, 1.0)
    lost: Float64Array = np.where(np.isnan(elected), np.nan, total)
    return lost


def _magnitude(differences: Float64Array) -> Float32Array:
    with np.errstate(over="ignore", under="ignore"):
        return np.abs(differences).astype(np.float32)


def magnitudes(
    values: RawBytes, base: RawBytes, dtype: str, batch_bytes: int = _BATCH_BYTES
) -> Iterator[Float32Array]:
    """How large the differences from ``base`` are, as ``ties`` compares them, in batches."""
    for rows in _batches(len(values), values.shape[1], batch_bytes):
        with np.errstate(invalid="ignore", over="ignore"):
            yield _magnitude(widen(values[rows], dtype) - widen(base[rows], dtype)).reshape(-1)
