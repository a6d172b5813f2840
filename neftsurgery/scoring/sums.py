"""From sums to scores: how far a neuron moved, as one number.

Every score follows from ``a.a``, ``d.d`` and ``a.d`` (``d = b - a``) and the count of changed
elements; the cosine also from ``r.r``, the part of ``d`` not parallel to ``a``, because the obvious
``a.a d.d - (a.d)^2`` cancels where ``d`` is nearly parallel to ``a``. The cosine distance of a
neuron's vector before and after fine-tuning is the sensitivity of NeFT (Xu et al., "Let's Focus on
Neuron: Neuron-Level Supervised Fine-tuning for Large Language Model", COLING 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..neurons.anatomy import NeuronTensor
from ..neurons.layout import Layout
from ..neurons.vectors import blocks, gather
from ..tensors.arrays import Float32Array, Float64Array, Int64Array, Mask, RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.floats import widen
from ..tensors.header import TensorInfo
from ..tensors.reader import RowReader
from . import kernels

#: Scores that the base's weights alone have, and all.
BASE_SCORES: Final = ("magnitude", "lowrank", "norm", "random")
SCORES: Final = ("cosine", "l2", "relative", "changed", *BASE_SCORES)
_LARGEST = float(np.finfo(np.float32).max)
#: Below this share of ``d.d`` not parallel to ``a``, float32 sums lose the cosine. Its relative error is that
#: of the sums, about 2e-7, times a few, divided by this share.
_LEAST_ACROSS = 0.25


@dataclass(frozen=True, slots=True)
class Exact:
    """Float64 results for some vectors, ``[k]``, scaled by ``scale``: 1 unless squares leave the range."""

    aa: Float64Array
    dd: Float64Array
    ad: Float64Array
    bb: Float64Array
    ab: Float64Array
    rr: Float64Array
    changed: Int64Array
    finite: Mask
    scale: Float64Array

    def score(self, kind: str, width: Int64Array) -> Float64Array:
        """The score ``kind`` of each of them, of vectors of ``width`` elements."""
        if kind == "cosine":
            return _cosine_distance(self.aa, self.bb, self.ab, self.rr)
        if kind == "l2":
            return np.minimum(np.sqrt(self.dd) / self.scale, _LARGEST)
        if kind == "relative":
            moved = np.where(self.bb == 0, 0.0, _LARGEST)
            return np.where(self.aa == 0, moved, np.minimum(np.sqrt(self.dd) / np.sqrt(self.aa), _LARGEST))
        if kind == "changed":
            return self.changed / width
        if kind == "norm":
            return np.minimum(self.scale / np.sqrt(self.aa), _LARGEST)
        if kind == "magnitude":
            return np.minimum(np.sqrt(self.aa) / self.scale, _LARGEST)
        raise ValueError(f"unknown score {kind!r}")


def exact(dtype: str, a: RawBytes, b: RawBytes, rows: Int64Array | None = None) -> Exact:
    """Float64 sums of whole vectors, as raw bytes ``[n, width * itemsize]``: those in ``rows``, or all."""
    carrier = DTYPES[dtype].carrier
    kernel = kernels.exact_sums(dtype)
    rows = np.arange(len(a)) if rows is None else rows
    count = len(rows)
    out, changed, finite = np.empty((7, count)), np.empty(count, np.int64), np.empty(count, np.bool_)
    a, b = a.view(carrier), b.view(carrier)
    kernel(a, b, rows, 1.0, out, changed, finite)
    scale = np.ones(count)
    if dtype == "F64":
        top = out[6]
        far = finite & (top > 0) & ((top < 1e-70) | (top > 1e70))
        for row in np.flatnonzero(far):
            scale[row] = 2.0 ** -int(np.clip(np.frexp(top[row])[1], -1021, 1021))
            one = slice(row, row + 1)
            kernel(a, b, rows[one], scale[row], out[:, one], changed[one], finite[one])
    return Exact(out[0], out[1], out[2], out[3], out[4], out[5], changed, finite, scale)


class Sums:
    """The sums ``[n]`` of some neurons of one tensor, and which of them were refined in float64."""

    def __init__(self, sums: Float64Array, changed: Int64Array) -> None:
        self.aa, self.dd, self.ad = sums  # once refined, NaN for neurons with a NaN or Inf element
        self.changed = changed
        self.finite = np.ones(len(changed), np.bool_)  # whether all elements of both vectors are finite
        self._refined: list[tuple[Int64Array, Exact]] = []

    def doubtful(self, dtype: str) -> Int64Array:
        """The neurons whose float32 sums are not accurate enough for their scores: give them to `refine`."""
        low, high = (1e-140, 1e140) if dtype == "F64" else (1e-30, 1e37)
        with np.errstate(all="ignore"):
            across = self.aa * self.dd - self.ad * self.ad
            good = (self.aa >= low) & (self.aa <= high)
            moved = (self.dd >= low) & (self.dd <= high) & (across >= _LEAST_ACROSS * self.aa * self.dd)
            return np.flatnonzero(~(good & (moved | (self.changed == 0))))

    def refine(self, index: Int64Array, values: Exact) -> None:
        """Take the exact values for the neurons ``index``."""
        with np.errstate(all="ignore"):
            factor = values.scale**-2
            for mine, theirs in ((self.aa, values.aa), (self.dd, values.dd), (self.ad, values.ad)):
                mine[index] = np.where(values.finite, theirs * factor, np.nan)
        self.finite[index] = values.finite
        self._refined.append((index, values))

    @classmethod
    def joined(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of the neurons of all ``parts``, one after the other."""
        if len(parts) == 1:
            return parts[0]
        sums = [np.concatenate([getattr(part, which) for part in parts]) for which in ("aa", "dd", "ad")]
        whole = cls(np.stack(sums), np.concatenate([part.changed for part in parts]))
        whole.finite = np.concatenate([part.finite for part in parts])
        start = 0
        for part in parts:
            whole._refined += [(start + index, values) for index, values in part._refined]
            start += len(part.changed)
        return whole

    def score(self, kind: str, width: int | Int64Array) -> Float32Array:
        """The score ``kind`` (not ``random``) of each neuron, float32 ``[n]``; NaN where not finite.

        ``width``: elements of a vector; an array ``[n]`` if they differ.
        """
        widths = np.broadcast_to(width, len(self.changed))
        with np.errstate(all="ignore"):
            mine = Exact(self.aa, self.dd, self.ad, *self._derived(), self.changed, self.finite, np.ones(1))
            result = mine.score(kind, widths)
            for index, values in self._refined:
                result[index] = values.score(kind, widths[index])
            result[~self.finite] = np.nan
            return result.astype(np.float32)

    def parts(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """``b.b``, ``a.b`` and ``r.r``, the refined ones included; for sums over units."""
        with np.errstate(all="ignore"):
            bb, ab, rr = self._derived()
            for index, v in self._refined:
                factor = v.scale**-2
                bb[index], ab[index], rr[index] = v.bb * factor, v.ab * factor, v.rr * factor
            return bb, ab, rr

    def _derived(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        safe = np.where(self.aa > 0, self.aa, 1.0)
        rr = np.where(self.aa > 0, self.dd - self.ad * (self.ad / safe), self.dd)
        return self.aa + 2 * self.ad + self.dd, self.aa + self.ad, rr


def _cosine_distance(aa: Float64Array, bb: Float64Array, ab: Float64Array, rr: Float64Array) -> Float64Array:
    """``1 - cos(a, b)`` without cancellation: from the sine for small angles, else from the cosine."""
    cos = np.clip(ab / (np.sqrt(aa) * np.sqrt(bb)), -1.0, 1.0)
    small = np.minimum(rr / bb, 1.0) / (1.0 + cos)
    result = np.where(cos > 0.7, small, 1.0 - cos)
    zeros = (aa == 0).astype(np.int8) + (bb == 0)
    return np.where(zeros == 0, result, np.where(zeros == 2, 0.0, 1.0))


class UnitSums:
    """Running sums of units. A unit is the concatenation of vectors, which arrive one tensor at a time.

    The parts of ``d`` across ``a`` do not simply add up: joining vectors with ratios
    ``c = a.d / a.a`` of their own adds ``(c1 - c2)^2 a1.a1 a2.a2 / (a.a)`` (the update of Chan,
    Golub and LeVeque for variances), which cancels nowhere.
    """

    def __init__(self, count: int) -> None:
        self._aa, self._dd, self._ad, self._bb, self._ab, self._rr = np.zeros((6, count))
        self._changed = np.zeros(count, np.int64)
        self.width = np.zeros(count, np.int64)  # elements of each unit so far
        self._finite = np.ones(count, np.bool_)

    def add(self, unit: Int64Array, sums: Sums, width: int) -> None:
        """Join the neurons of ``sums``, each ``width`` wide, to their units (``unit`` ``[n]``, -1: none)."""
        count = len(self._aa)
        mine = unit >= 0
        unit = unit[mine]
        bb, ab, rr = (part[mine] for part in sums.parts())
        aa, dd, ad = sums.aa[mine], sums.dd[mine], sums.ad[mine]
        good = sums.finite[mine]

        def total(values: Float64Array | Int64Array) -> Float64Array:
            return np.bincount(unit, np.where(good, values, 0.0), minlength=count).astype(np.float64)

        with np.errstate(all="ignore"):
            new_aa, new_ad = total(aa), total(ad)
            ratio = np.where(new_aa > 0, new_ad / new_aa, 0.0)
            own = np.where(aa > 0, ad / np.where(aa > 0, aa, 1.0), 0.0)
            new_rr = total(rr + (own - ratio[unit]) ** 2 * aa)
            sum_aa = self._aa + new_aa
            before = np.where(self._aa > 0, self._ad / np.where(self._aa > 0, self._aa, 1.0), 0.0)
            shared = np.where(sum_aa > 0, self._aa * (new_aa / np.where(sum_aa > 0, sum_aa, 1.0)), 0.0)
            self._rr += new_rr + (ratio - before) ** 2 * shared
        self._aa, self._ad = sum_aa, self._ad + new_ad
        self._dd += total(dd)
        self._bb += total(bb)
        self._ab += total(ab)
        self._changed += np.bincount(unit, sums.changed[mine], minlength=count).astype(np.int64)
        self.width += np.bincount(unit, minlength=count) * width
        self._finite &= np.bincount(unit, ~good, minlength=count) == 0

    def score(self, kind: str) -> Float32Array:
        """As `Sums.score`, per unit."""
        sums = (self._aa, self._dd, self._ad, self._bb, self._ab, self._rr)
        whole = Exact(*sums, self._changed, self._finite, np.ones(1))
        with np.errstate(all="ignore"):
            result = whole.score(kind, np.maximum(self.width, 1))
            result[~self._finite | (self.width == 0)] = np.nan
            return result.astype(np.float32)


def random_scores(name: str, count: int, seed: int) -> Float32Array:
    """Uniform scores in [0, 1), float32 ``[count]``: the control. They depend on name and seed only."""
    words = [seed, xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))]
    return np.random.Generator(np.random.PCG64(words)).random(count, dtype=np.float32)


def norms(energies: Float64Array) -> Float32Array:
    """The roots of sums of squares, as scores."""
    return np.minimum(np.sqrt(energies), _LARGEST).astype(np.float32)


def low_rank_energies(weights: RowReader, info: TensorInfo, layout: Layout, rank: int) -> Float64Array:
    """The squared norm of each neuron's vector in the approximation of rank ``rank``, ``[n]``.

    The neurons along the last neuron axis are the rows of one matrix: each expert has its own. Vectors whose
    squares are not finite count as zeros and get NaN. LIFT (Liu et al., "LIFT the Veil for the Truth", ICML
    2025) trains the elements that are largest in the approximation.
    """
    count = layout.shape[layout.axes[-1]]
    energies = np.empty(layout.count)

    def parts(first: int) -> Iterator[tuple[slice, Float64Array]]:
        """The vectors of the matrix whose first neuron this is, some at a time."""
        for start, stop in blocks(info, layout, count):
            here = slice(first + start, first + stop)
            rows = widen(gather(weights, info, layout, np.arange(here.start, here.stop)), info.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                energies[here] = np.where(np.isfinite(np.square(rows).sum(1)), 0.0, np.nan)
            rows[np.isnan(energies[here])] = 0.0
            yield here, rows

    for first in range(0, layout.count, count):
        if layout.width <= count:  # by the smaller of the two products of the matrix with itself
            product = sum(rows.T @ rows for _, rows in parts(first))
            directions = np.linalg.eigh(product).eigenvectors[:, -rank:]
            for here, rows in parts(first):
                energies[here] += np.square(rows @ directions).sum(1)
        else:
            matrix = np.concatenate([rows for _, rows in parts(first)])
            values, directions = np.linalg.eigh(matrix @ matrix.T)
            squares = np.square(directions[:, -rank:])
            energies[first : first + count] += squares @ np.maximum(values[-rank:], 0.0)
    return energies


class LayerUnits:
    """The units of one layer, joined tensor by tensor."""

    def __init__(self, name: str, tensors: Sequence[NeuronTensor]) -> None:
        self.name = name
        self._tensors = tensors
        spans = [(t.units.base, t.units.base + t.units.outer * t.units.units) for t in tensors if t.units]
        self._first = min(low for low, _ in spans)
        self._sums = UnitSums(max(high for _, high in spans) - self._first)

    def add(self, tensor: NeuronTensor, sums: Sums) -> None:
        """Join a tensor's neurons to their units."""
        assert tensor.units is not None  # chosen for it
        self._sums.add(tensor.units.ids() - self._first, sums, tensor.layout.width)

    def numbers(
        self, score: str, seed: int, energies: Callable[[str], Float64Array]
    ) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        """Per tensor its neurons' units, and the scores of these. ``energies`` are for ``lowrank``."""
        count, all_ids = len(self._sums.width), [t.units.ids() for t in self._tensors if t.units is not None]
        if score == "random":
            units = random_scores(self.name, count, seed)
        elif score == "lowrank":
            total = np.zeros(count)
            for tensor, ids in zip(self._tensors, all_ids, strict=True):
                mine = ids >= 0
                np.add.at(total, ids[mine] - self._first, energies(tensor.info.name)[mine])
            units = norms(total)
        else:
            units = self._sums.score(score)
        units[np.isnan(self._sums.score("changed"))] = np.nan
        for tensor, ids in zip(self._tensors, all_ids, strict=True):
            yield tensor.info.name, {"unit": ids, "score": units[ids - self._first]}
