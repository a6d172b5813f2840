"""Tables for blocks: what is alike in a sample of them, and the frequencies of what was counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .elements import BLOCK, CLASSES, FINE, HASH, NEVER, PRECISION, Carrier, Elements, fine_classes
from .tables import MOST_CONTEXTS, MOST_SYMBOLS, Alphabet, FrequencyTable, contexts_of

_TOTAL = 1 << PRECISION
#: What a context takes in the stored table, and a frequency other than 0, about, in bits, compressed.
_CONTEXT_BITS, _SYMBOL_BITS = 100, 10
#: Where more than this share of the elements change, all are coded if that takes about as much: it is faster.
_MANY, _NEAR = 0.1, 1.005
#: How many numbers of a block are searched for those that come often, how often that is, how many are kept.
_SEARCHED, _OFTEN, _HOT = 1 << 17, 1 / 1024, 160
_WHOLE = tuple(np.uint64(rule) for rule in (0, 255, 0, 0, 0, 0))  # the context is the number itself


def fit(pairs: Sequence[tuple[Carrier, Carrier]], elements: Elements, share: float = 1.0) -> FrequencyTable:
    """The table for blocks like ``pairs`` of base and tuned elements, which are a ``share`` of them all."""
    from . import kernels  # numba takes long to import, and most commands need none

    width, classes = 8 * elements.size, np.empty(BLOCK + MOST_CONTEXTS, np.uint16)
    found = [np.empty_like(base) for base, _ in pairs]
    for (base, tuned), numbers in zip(pairs, found, strict=True):
        kernels.differences(base, tuned, elements.rules, numbers)
    hot, counted = _hot(found), np.zeros((256, CLASSES + (1 << HASH)), np.uint32)
    for (base, _), numbers in zip(pairs, found, strict=True):
        kernels.classify(numbers, hot, classes)
        kernels.count(base, elements.rules, classes[: len(base)], counted)
    seen = np.flatnonzero(counted.any(axis=1)) if counted.any() else np.zeros(1, int)
    counts = counted[seen].astype(np.int64)
    first = _contexts(counts, share)
    values = np.add.reduceat(counts, first, axis=0)
    starts = np.append(0, seen[first[1:]]).astype(np.uint8)
    changes = values * (np.arange(values.shape[1]) > 0)
    share_changed = int(changes.sum()) / max(1, int(values.sum()))
    never, steps = np.empty(1 << HASH, np.uint64), np.zeros((len(starts), counts.shape[1]), np.uint32)
    if share_changed <= 0.5:
        kernels.enter(np.array([NEVER], np.uint64), never)
        for (base, _), numbers in zip(pairs, found, strict=True):
            homes, gaps, _ = changes_of(base, numbers, elements, contexts_of(starts))
            kernels.classify(gaps, never, classes)
            kernels.count(homes, _WHOLE, classes[: len(gaps)], steps)
    plain = float((steps[:, :CLASSES] * fine_classes(64)[1]).sum())
    sparse = _bits(changes) + _bits(steps) + plain
    if share_changed > 0.5 or (share_changed > _MANY and _bits(values) < _NEAR * sparse):
        return FrequencyTable(starts, None, _alphabet(values, hot, width, share))
    gap_alphabet = _alphabet(steps.astype(np.int64), never, 20, share)
    return FrequencyTable(starts, gap_alphabet, _alphabet(changes, hot, width, share))


def fit_memory(blocks: int, nbytes: int) -> int:
    """Bytes that `fit` and its pairs take, of so many blocks of at most ``nbytes`` on either side."""
    return 3 * blocks * nbytes + (8 << 20)  # both sides, and their differences


def _hot(found: Sequence[Carrier]) -> NDArray[np.uint64]:
    """A hash table of numbers that come far more often than others of their classes, if there are any."""
    from .kernels import enter

    some = [numbers[:: len(numbers) // _SEARCHED + 1] for numbers in found]
    large = np.concatenate([numbers[numbers >= 1 << FINE] for numbers in some]).astype(np.uint64)
    numbers, counts = np.unique(large[:: len(large) // _SEARCHED + 1], return_counts=True)
    # Such as the steps that zeros make where an optimizer moves all by its rate.
    first, bits = fine_classes(64)
    classes = np.searchsorted(first, numbers, "right") - 1
    expected = np.bincount(classes, counts, CLASSES)[classes] / 2.0 ** bits[classes]
    often = (counts >= 3 * expected) & (counts >= np.maximum(8, _OFTEN * counts.sum()))
    often &= numbers < 1 << 32  # as `Alphabet.tops` are
    order = np.argsort(counts[often], kind="stable")[::-1][:_HOT]
    hot = np.empty((1 << HASH) * (len(order) > 0), np.uint64)
    if len(order):
        enter(numbers[often][order], hot)
    return hot


def changes_of(
    base: Carrier, numbers: Carrier, elements: Elements, contexts: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], Carrier]:
    """The events of `kernels.find_changes`: their contexts, gaps and differences."""
    from .kernels import find_changes

    most = int(contexts[-1]) + 1
    room = int(np.count_nonzero(numbers)) + most
    events = (np.empty(room, np.uint8), np.empty(room, np.uint32), np.empty(room, numbers.dtype))
    last, since = np.empty(most, np.int64), np.zeros((4, most), np.int64)
    find_changes(base, numbers, elements.rules, contexts, *events, most, last, since)
    return events


def _contexts(counts: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The first rows of contexts in ``counts``, ``[exponents, classes]``: joined while that costs less."""
    coarse = [*range(16), *range(16, 32, 4), *range(32, CLASSES, 8), *range(CLASSES, counts.shape[1])]
    values = np.add.reduceat(counts, coarse, axis=1)
    groups = list(values[:, values.any(axis=0)])
    starts, price = list(range(len(counts))), _SYMBOL_BITS * share
    costs = [_bits(group, price) for group in groups]
    joint = [_bits(a + b, price) for a, b in pairwise(groups)]
    while len(groups) > 1:
        added = [joint[i] - costs[i] - costs[i + 1] for i in range(len(joint))]
        i = int(np.argmin(added))
        if added[i] > _CONTEXT_BITS * share and len(groups) <= MOST_CONTEXTS:
            break
        groups[i : i + 2], costs[i : i + 2] = [groups[i] + groups[i + 1]], [joint[i]]
        del starts[i + 1]
        joint[max(0, i - 1) : i + 2] = [
            _bits(groups[j] + groups[j + 1], price) for j in (i - 1, i) if 0 <= j < len(groups) - 1
        ]
    return np.array(starts)


def _bits(counts: NDArray[Any], price: float = 0.0) -> float:
    """The entropy of counted symbols by context, in bits, and the ``price`` of each in the table."""
    whole, some = counts.sum(axis=-1, dtype=np.float64), counts[counts > 0].astype(np.float64)
    entropy = (whole * np.log2(np.maximum(whole, 1))).sum() - (some * np.log2(some)).sum()
    return float(entropy) + price * len(some)


def _alphabet(counts: NDArray[np.int64], hot: NDArray[np.uint64], width: int, share: float) -> Alphabet:
    """The symbols that code numbers of ``width`` bits in fewest bits; the last one, any other number."""
    first, bits = fine_classes(width)
    price, fine = _SYMBOL_BITS * share, counts[:, : len(first)]
    single = np.flatnonzero(counts[:, CLASSES:].any(axis=0))
    while True:
        levels = _levels(fine, price)
        starts = np.flatnonzero(np.arange(len(first)) % (1 << levels) == 0)
        joined = np.add.reduceat(fine, starts, axis=1)
        used = joined.any(axis=0)
        starts, joined = starts[used], joined[:, used]
        if len(starts) + len(single) < MOST_SYMBOLS:
            break
        price *= 2
    plain = bits[starts] + levels[starts].astype(np.uint64)
    tops = np.concatenate([first[starts] >> plain, hot[single], [0]])
    last = np.ones((len(counts), 1), np.int64)
    counts = np.concatenate([joined, counts[:, CLASSES + single], last], axis=1)
    counts[:, :-1][:, tops[:-1] == NEVER] |= width == 20  # a gap of no further change: in all contexts, too
    plains = np.concatenate([plain, np.zeros(len(single)), [width]])
    return Alphabet(tops.astype(np.uint32), plains.astype(np.uint8), _rounded(counts))


def _levels(counts: NDArray[np.int64], price: float) -> NDArray[np.int64]:
    """Of each fine class, how often its range is best doubled, so that one symbol has its neighbours, too."""
    whole = np.log2(np.maximum(counts.sum(axis=1, keepdims=True), 1))
    levels = np.zeros(counts.shape[1], np.int64)

    def cost(counts: NDArray[np.int64], level: int) -> NDArray[np.float64]:
        each = counts * (whole - np.log2(np.maximum(counts, 1)) + level) + price * (counts > 0)
        return np.asarray(each.sum(axis=0))

    best = cost(counts, 0)
    for level in range(1, FINE):
        counts = counts[:, ::2] + counts[:, 1::2]
        joined, apart = cost(counts, level), best[::2] + best[1::2]
        levels = np.where(np.repeat(joined <= apart, 1 << level), level, levels)
        best = np.minimum(joined, apart)
    return levels


def _rounded(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Frequencies that sum to 2^PRECISION per row, at least one for each symbol that occurs."""
    found = np.zeros(counts.shape, np.int64)
    for row, weights in zip(found, counts, strict=True):
        total = _TOTAL
        while True:
            row[:] = np.maximum(weights * total // weights.sum(), weights > 0)
            if row.sum() <= _TOTAL:
                break
            total -= int(row.sum()) - _TOTAL
        row[int(np.argmax(row))] += _TOTAL - int(row.sum())
    return found.astype(np.uint16)
