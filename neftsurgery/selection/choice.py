"""Which neurons a budget chooses, given their scores: arrays in, masks out.

A budget takes the first neurons in order, by score and then by position. They are not sorted: sorting
hundreds of millions of scores would take several times the memory of the scores. Instead the score at
which the budget ends, the *cut*, is found in two passes, which count the neurons by the upper half of the
bits of their scores, and then by the lower. The neurons that score exactly the cut are then taken in their
order. Scores may be read anew for each pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from ..errors import MismatchError, UsageError
from ..tensors.arrays import Float32Array, Mask
from .budget import Amount, Budget

# Elements handled at once: what a pass reads and writes stays in a core's cache.
_CHUNK = 1 << 16
# Pools of up to so many neurons are sorted: for them calls cost more than elements.
_SORTED = 1 << 14
# The ordered image of a float32 is its magnitude's bits as an integer, negated for a negative
# number. Both zeros have image 0, and this is the image of infinity.
_INFINITY = 0x7F80_0000
_BINS = 1 << 16


class ScoreVector(Protocol):
    """Scores, float32 ``[n]``: an array, or what reads ranges of one from a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Float32Array: ...


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Consecutive neurons of one tensor, in tie order, that cost the same."""

    tensor: str  # this and the layer are names of the pools that the neurons belong to
    layer: str
    cost: int  # parameters of one neuron
    scores: ScoreVector  # high means sensitive. NaN: cannot be chosen. Infinities are ordinary values

    def __post_init__(self) -> None:
        first = self.scores[:0]
        if first.ndim != 1 or first.dtype != np.float32:
            raise ValueError(f"scores must be a float32 vector, not {first.ndim} axes of {first.dtype}")
        if self.cost < 1:
            raise ValueError(f"a neuron must have at least one parameter, not {self.cost}")


def choose(
    blocks: Sequence[Block],
    budget: Budget,
    *,
    parameters: int,
    chunk: int = _CHUNK,
    sorted_pool: int = _SORTED,
) -> list[Mask]:
    """The neurons that ``budget``, anything but ``changed``, chooses, as one mask per block.

    The order of the blocks (by tensor name, then index), then the position in a block, breaks ties. A
    percentage in ``budget.params`` is of ``parameters``, those of the whole model. The result depends neither
    on ``chunk`` (how many neurons are compared at once) nor on ``sorted_pool`` (the largest pool that is
    sorted, not searched). Memory on top of the scores: a byte per neuron, one more with a cap per tensor,
    four more for the policy ``random``. Raises as `Scores.select`.
    """
    if budget.changed:
        raise ValueError("a budget by changed does not depend on scores")
    counts = [_count_candidates(block.scores, chunk) for block in blocks]
    if not any(counts):
        raise MismatchError(
            "no neuron can be scored",
            hint="every neuron is left out or has a NaN or infinite element",
        )
    keys: Sequence[ScoreVector] = [block.scores for block in blocks]
    if budget.policy == "random":
        keys = _random_keys(keys, budget.seed, chunk)
    highest = budget.policy != "reversed"
    allowed: list[Mask] | None = None
    ranking = _Ranking(keys, counts, [1] * len(blocks), None, highest, chunk, sorted_pool)
    if budget.max_per_tensor is not None:
        pools = _pools(block.tensor for block in blocks)
        caps = [budget.max_per_tensor] * len(pools)
        allowed = _best(ranking, pools.values(), caps)
    if budget.threshold is not None:
        above = [np.empty(len(block), np.bool_) for block in keys]
        for i, part, some in ranking.parts(range(len(keys))):
            np.greater(some, budget.threshold, out=above[i][part], signature="dd->?")  # in float64
        return above if allowed is None else [a & b for a, b in zip(above, allowed, strict=True)]
    sizes, costs = counts, [1] * len(blocks)
    if budget.params is not None:
        costs = [block.cost for block in blocks]
        sizes = [count * cost for count, cost in zip(counts, costs, strict=True)]
    pools = _pools(_pool_names(blocks, budget))
    limits = _limits(pools, sizes, budget, parameters)
    if budget.allocate != "size":
        totals = [sum(sizes[number] for number in members) for members in pools.values()]
        scores = [max(0.0, float(np.nansum(block.scores[:], dtype=np.float64))) for block in blocks]
        weights = [1.0 if budget.allocate == "equal" else sum(scores[i] for i in p) for p in pools.values()]
        limits = _allocate(sum(limits), [round(w / (max(weights) or 1.0) * 2**52) for w in weights], totals)
    if allowed is not None:
        counts = [int(np.count_nonzero(mask)) for mask in allowed]
    ranking = _Ranking(keys, counts, costs, allowed, highest, chunk, sorted_pool)
    masks = _best(ranking, pools.values(), limits)
    if budget.params is not None and not any(mask.any() for mask in masks):
        raise _no_room(budget.params, limits, [c for c, n in zip(costs, counts, strict=True) if n])
    return masks


def _count_candidates(scores: ScoreVector, chunk: int) -> int:
    parts = (scores[start : start + chunk] for start in range(0, len(scores), chunk))
    return sum(int(np.count_nonzero(part == part)) for part in parts)  # NaN differs from itself


def _pool_names(blocks: Sequence[Block], budget: Budget) -> Iterable[str]:
    if budget.per == "tensor" or budget.like is not None:
        return (block.tensor for block in blocks)
    return (block.layer if budget.per == "layer" else "" for block in blocks)


def _pools(names: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of the blocks of each pool; pools in the order of their first blocks."""
    pools: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        pools.setdefault(name, []).append(number)
    return pools


def _no_room(params: Amount, limits: Sequence[int], costs: Sequence[int]) -> UsageError:
    least, most = min(costs), max(costs)
    sizes = f"{least}" if least == most else f"{least} (the smallest) to {most}"
    return UsageError(
        f"[[params={params}]] is too small for a single neuron",
        expected=f"neurons of {sizes} parameters",
        found=f"a budget of {sum(limits)}" + (f", split over {len(limits)} pools" if len(limits) > 1 else ""),
        hint="give a larger number, or a share such as [[params=3%]]"
        + (", or [[per=model]]" if len(limits) > 1 else ""),
    )


def _limits(pools: dict[str, list[int]], sizes: Sequence[int], budget: Budget, parameters: int) -> list[int]:
    """How much of each pool to choose, in the unit of ``sizes``, which are per block."""
    totals = [sum(sizes[number] for number in members) for members in pools.values()]
    if budget.neurons is not None:
        percent, count = budget.neurons.percent, budget.neurons.count
        if percent is not None:
            whole = percent.denominator * 100
            nearest = [(2 * percent.numerator * n + whole) // (2 * whole) for n in totals]  # halves up
            return [max(count, int(n > 0)) for count, n in zip(nearest, totals, strict=True)]
        return _split(count or 0, totals)
    if budget.params is not None:
        percent, count = budget.params.percent, budget.params.count
        if percent is not None:
            count = percent.numerator * parameters // (percent.denominator * 100)
        return _split(count or 0, totals)
    return _like_limits(pools, totals, budget.like or {})


def _like_limits(pools: dict[str, list[int]], totals: Sequence[int], like: Mapping[str, int]) -> list[int]:
    for name in like:
        if name not in pools:
            raise UsageError(
                "[[like]] names a tensor that is not scored here",
                tensor=name,
                hint="score with the same [[anatomy]], [[include]] and [[exclude]] as for that selection",
            )
    for name, total in zip(pools, totals, strict=True):
        if like.get(name, 0) > total:
            raise UsageError(
                "[[like]] asks for more neurons than have a score",
                tensor=name,
                expected=like[name],
                found=total,
            )
    return [like.get(name, 0) for name in pools]


def _split(amount: int, sizes: Sequence[int]) -> list[int]:
    """Split ``amount`` in proportion to ``sizes`` by largest remainder; ties go to the earlier one."""
    total = sum(sizes)
    shares = [amount * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(amount * sizes[i] % total))
    for i in by_remainder[: amount - sum(shares)]:
        shares[i] += 1
    return shares


def _allocate(amount: int, weights: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Split ``amount`` in proportion to ``weights``; what exceeds a pool's size goes to the others."""
    limits, left = [0] * len(sizes), [number for number, size in enumerate(sizes) if size]
    while left:
        mine = [weights[i] for i in left]
        shares = dict(zip(left, _split(amount, mine if any(mine) else [1] * len(left)), strict=True))
        left = [i for i, share in shares.items() if share < sizes[i]]
        for i in shares.keys() - left:
            limits[i] = sizes[i]
            amount -= sizes[i]
        if len(left) == len(shares):
            return [shares.get(i, limit) for i, limit in enumerate(limits)]
    return limits


# Keys: what the neurons are ordered by.


def _random_keys(scores: Sequence[ScoreVector], seed: int, chunk: int) -> list[Float32Array]:
    """A random float32 for every candidate, of all there are: few are equal. NaN for the others."""
    generator = np.random.Generator(np.random.PCG64(seed))
    keys = [np.full(len(block), np.nan, np.float32) for block in scores]
    for key, block in zip(keys, scores, strict=True):
        for start in range(0, len(block), chunk):
            part = block[start : start + chunk]
            candidates = part == part
            images = generator.integers(
                -_INFINITY, _INFINITY, np.count_nonzero(candidates), np.int32, endpoint=True
            )
            drawn = np.abs(images).view(np.float32)
            np.negative(drawn, out=drawn, where=images < 0)
            key[start : start + chunk][candidates] = drawn
    return keys


class CutSearch:
    """The search for the key at which so many end, in two passes over all keys and little memory.

    The first pass counts the keys by the upper half of the bits of their images, the second those of the half
    that the cut is among by the lower. NaN is beyond infinity.
    """

    cut: np.float32  # after both passes: the least extreme key such that everything beyond it fits
    room: int  # what is left of what has to fit

    def __init__(self, *, highest: bool = True) -> None:
        self._highest = highest
        self._high: int | None = None  # the upper half of the cut's bits, known after the first pass
        self._counts = np.zeros(_BINS, np.int64)

    @property
    def total(self) -> int:
        """The costs of all keys of this pass."""
        return int(self._counts.sum())

    def add(self, keys: Float32Array, cost: int = 1) -> None:
        """Take in some keys; all of them once, then, after `settle`, all of them again."""
        bits = keys.view(np.int32)
        image = np.where(bits < 0, -(bits & 0x7FFF_FFFF), bits)
        image = image if self._highest else -image
        high = self._high
        bins = (image >> 16) + _BINS // 2 if high is None else image[image >> 16 == high] & (_BINS - 1)
        self._counts += cost * np.bincount(bins, minlength=_BINS)

    def settle(self, room: int) -> None:
        """End a pass; ``room``: the costs that fit, after the second pass what the first one left of them."""
        beyond = np.cumsum(self._counts[::-1])  # from the top down
        # How many bins fit; if all do, the cut is the least number.
        last = _BINS // 2 + (-_INFINITY >> 16) if self._high is None else 0
        count = min(int(np.searchsorted(beyond, room, side="right")), _BINS - 1 - last)
        self.room = room - (int(beyond[count - 1]) if count else 0)
        if self._high is None:
            self._high, self._counts = _BINS - 1 - count - _BINS // 2, np.zeros(_BINS, np.int64)
            return
        image = (self._high << 16) + _BINS - 1 - count
        magnitude = np.array(abs(image), np.int32).view(np.float32)[()]
        self.cut = np.float32(magnitude if (image >= 0) == self._highest else -magnitude)


@dataclass(frozen=True, slots=True, eq=False)
class _Ranking:
    """Blocks to choose from: per block the keys, and how many neurons may be chosen, at which cost each."""

    keys: Sequence[ScoreVector]
    counts: Sequence[int]
    costs: Sequence[int]
    allowed: Sequence[Mask] | None
    highest: bool
    chunk: int
    sorted_pool: int

    def parts(self, members: Iterable[int]) -> Iterator[tuple[int, slice, Float32Array]]:
        """The keys of some blocks, ``chunk`` at a time: the number of the block, and which of it they are."""
        for i in members:
            for start in range(0, len(self.keys[i]), self.chunk):
                part = slice(start, min(start + self.chunk, len(self.keys[i])))
                yield i, part, self.keys[i][part]


def _best(ranking: _Ranking, pools: Iterable[Sequence[int]], limits: Sequence[int]) -> list[Mask]:
    """The first neurons of each pool in order, as long as their costs stay within the pool's limit."""
    masks: list[Mask] = [np.zeros(len(keys), np.bool_) for keys in ranking.keys]
    for members, limit in zip(pools, limits, strict=True):
        if limit < 1:
            continue
        if sum(len(ranking.keys[i]) for i in members) <= ranking.sorted_pool:
            _take_sorted(ranking, members, limit, masks)
        else:
            _take_to_cut(ranking, members, limit, masks)
    return masks


def _take_sorted(ranking: _Ranking, members: Sequence[int], limit: int, masks: Sequence[Mask]) -> None:
    keys = np.concatenate([ranking.keys[i][:] for i in members])
    if ranking.allowed is not None:
        keys[~np.concatenate([ranking.allowed[i] for i in members])] = np.nan
    if ranking.highest:
        np.negative(keys, out=keys)
    order = np.argsort(keys, kind="stable")[: sum(ranking.counts[i] for i in members)]  # NaN comes last
    lengths = [len(ranking.keys[i]) for i in members]
    costs = np.repeat([ranking.costs[i] for i in members], lengths)
    fitting = np.searchsorted(np.cumsum(costs[order]), limit, side="right")
    chosen = np.zeros(len(keys), np.bool_)
    chosen[order[:fitting]] = True
    for i, part in zip(members, np.split(chosen, np.cumsum(lengths)[:-1]), strict=True):
        masks[i][:] = part


def _take_to_cut(ranking: _Ranking, members: Sequence[int], limit: int, masks: Sequence[Mask]) -> None:
    search, room = CutSearch(highest=ranking.highest), min(limit, 1 << 62)
    for _ in range(2):
        for cost, keys in _batches(ranking, members):
            search.add(keys, cost)
        search.settle(room)
        room = search.room
    beyond = np.greater if ranking.highest else np.less  # NaN is neither
    for i, part, keys in ranking.parts(members):
        beyond(keys, search.cut, out=masks[i][part])
        if ranking.allowed is not None:
            masks[i][part] &= ranking.allowed[i][part]
    for i, part, keys in ranking.parts(members):
        tied = keys == search.cut
        if ranking.allowed is not None:
            tied &= ranking.allowed[i][part]
        places = np.flatnonzero(tied)
        taken = min(len(places), room // ranking.costs[i])
        masks[i][part.start + places[:taken]] = True
        room -= taken * ranking.costs[i]
        if taken < len(places) or not room:
            return


def _batches(ranking: _Ranking, members: Sequence[int]) -> Iterator[tuple[int, Float32Array]]:
    """What a neuron costs, and the keys of many such that may be chosen. Their order does not matter."""
    for cost, group in groupby(sorted(members, key=ranking.costs.__getitem__), key=ranking.costs.__getitem__):
        some, size = list[Float32Array](), 0
        for i, part, keys in ranking.parts(group):
            usable = keys == keys  # not NaN
            if ranking.allowed is not None:
                usable &= ranking.allowed[i][part]
            some.append(keys[usable])
            size += len(some[-1])
            if size >= ranking.chunk:
                yield cost, np.concatenate(some)
                some, size = [], 0
        if some:
            yield cost, np.concatenate(some)
