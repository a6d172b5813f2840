"""Frequencies of symbols: counted, rounded to what rANS needs, and stored with the code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compression import compress, content_size, decompress
from .elements import FINE, NEVER, PRECISION, Carrier, Elements, fine_classes

__all__ = ["MOST_CONTEXTS", "MOST_TABLES", "Alphabet", "FrequencyTable", "fit", "pack", "unpack"]

_TOTAL = 1 << PRECISION
MOST_CONTEXTS = 32
_MOST_SYMBOLS = 256
#: Tables of a delta.
MOST_TABLES = 1 << 10
_MOST_BYTES = 5 + MOST_CONTEXTS + 2 * _MOST_SYMBOLS * (5 + 2 * MOST_CONTEXTS)  # of a table
#: What a context takes in the stored table, and a frequency other than 0, about, in bits, compressed.
_CONTEXT_BITS, _SYMBOL_BITS = 100, 10
#: Where more than this share of the elements change, all are coded if that takes about as much: it is faster.
_MANY, _NEAR = 0.1, 1.005


@dataclass(frozen=True, eq=False)
class Alphabet:
    """Symbols, and how frequent each is in each context.

    A symbol stands for the numbers from ``least`` on that ``bits`` plain bits reach: uint8 ``[symbols]``, and
    uint32 ``[symbols]``, the ``tops``, which are ``least`` without those bits. ``frequencies``, uint16
    ``[contexts, symbols]``, sum to 2^PRECISION per context.
    """

    tops: NDArray[np.uint32]
    bits: NDArray[np.uint8]
    frequencies: NDArray[np.uint16]

    @property
    def least(self) -> NDArray[np.uint64]:
        """The least number of each symbol."""
        return self.tops.astype(np.uint64) << self.bits.astype(np.uint64)

    @cached_property
    def encoding(self) -> tuple[NDArray[np.uint8], *tuple[NDArray[np.uint64], ...]]:
        """The symbol of each fine class; least number and plain bits of symbols; what puts each into a state.

        That is, ``[contexts, symbols, 4]``: start, frequency, and what divides a state below 2^31 by the
        frequency: a factor and a shift.
        """
        first, _ = fine_classes(64)
        symbols = np.zeros(len(first), np.uint8)
        for symbol in np.argsort(self.bits, kind="stable")[::-1]:  # the narrowest that fits
            last = int(self.least[symbol]) + (1 << int(self.bits[symbol])) - 1
            start = np.searchsorted(first, self.least[symbol], "right") - 1
            symbols[start : np.searchsorted(first, np.uint64(last), "right")] = symbol
        wide = self.frequencies.astype(np.uint64)
        some = np.maximum(wide, 1)
        shift = 32 + np.ceil(np.log2(some)).astype(np.uint64)
        factor = (np.uint64(1) << shift) // some
        factor += (factor * some) != (np.uint64(1) << shift)  # rounded up
        starts = np.cumsum(wide, axis=1, dtype=np.uint64) - wide
        return (
            symbols,
            self.least,
            self.bits.astype(np.uint64),
            np.stack([starts, wide, factor, shift], axis=2),
        )

    @lru_cache(maxsize=64)  # noqa: B019
    def decoding(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint64]]:
        """The least number of each symbol; the symbol of each slot, and what a symbol does, both by context.

        That is frequency, start, plain bits and the symbol, from bits 0, 16, 32 and 40 on.
        """
        count, used = self.frequencies.shape
        slots = np.concatenate([np.repeat(np.arange(used), row) for row in self.frequencies]).astype(np.uint8)
        wide = self.frequencies.astype(np.uint64)
        entries, least = np.zeros((count, _MOST_SYMBOLS), np.uint64), np.zeros(_MOST_SYMBOLS, np.uint64)
        starts = np.cumsum(wide, axis=1, dtype=np.uint64) - wide
        symbols = np.arange(used, dtype=np.uint64)
        entries[:, :used] = (
            wide
            | starts << np.uint64(16)
            | self.bits.astype(np.uint64) << np.uint64(32)
            | symbols << np.uint64(40)
        )
        least[:used] = self.least
        return least, slots, entries.reshape(-1)


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The frequencies that code the blocks of one kind of tensor.

    ``starts``, uint8 ``[contexts]``, are the first exponents of the contexts. If there are no ``gaps``, every
    element has its value.
    """

    starts: NDArray[np.uint8]
    gaps: Alphabet | None
    values: Alphabet

    @cached_property
    def contexts(self) -> NDArray[np.uint8]:
        """The context of each exponent."""
        return (np.searchsorted(self.starts, np.arange(256), "right") - 1).astype(np.uint8)


def fit(pairs: Sequence[tuple[Carrier, Carrier]], elements: Elements, share: float = 1.0) -> FrequencyTable:
    """The table for blocks like ``pairs`` of base and tuned elements, which are a ``share`` of them all.

    Blocks that are not alike can be coded, too.
    """
    from . import kernels  # numba takes long to import, and most commands need none

    width = 8 * elements.size
    counts = np.zeros((256, len(fine_classes(width)[0])), np.uint32)
    shift, mask = (elements.carrier.type(rule) for rule in elements.rules[:2])
    found = []
    for base, tuned in pairs:
        numbers = np.empty_like(base)
        kernels.differences(base, tuned, elements.rules, numbers)
        kernels.count(((base >> shift) & mask).astype(np.uint8), numbers, counts)
        found.append(numbers)
    starts = _contexts(counts, share)
    joined = np.add.reduceat(counts, starts, axis=0, dtype=np.int64)
    dense = FrequencyTable(starts, None, _alphabet(joined, width, share))
    if 2 * int(joined[:, 0].sum()) < int(joined.sum()):
        return dense
    gap_counts = np.zeros((len(starts), len(fine_classes(20)[0]) + 1), np.uint32)
    for (base, _), numbers in zip(pairs, found, strict=True):
        homes, steps, _ = changes_of(base, numbers, elements, dense)
        kernels.count(homes, steps, gap_counts)
    changes = joined * (np.arange(joined.shape[1]) > 0)
    plain = int((gap_counts[:, :-1].sum(axis=0, dtype=np.uint64) * fine_classes(20)[1]).sum())
    sparse = _bits(changes) + _bits(gap_counts) + plain
    if int(changes.sum()) > _MANY * int(joined.sum()) and _bits(joined) < _NEAR * sparse:
        return dense
    gaps = _alphabet(gap_counts.astype(np.int64), 20, share)
    return FrequencyTable(starts, gaps, _alphabet(changes, width, share))


def changes_of(
    base: Carrier, numbers: Carrier, elements: Elements, table: FrequencyTable
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], Carrier]:
    """The events of `kernels.find_changes`: their contexts, gaps and differences."""
    from .kernels import find_changes

    most = len(table.starts)
    room = int(np.count_nonzero(numbers)) + most
    events = (np.empty(room, np.uint8), np.empty(room, np.uint32), np.empty(room, numbers.dtype))
    counters = np.empty((2, 256), np.int64)
    find_changes(base, numbers, elements.rules, table.contexts, *events, most, (counters[0], counters[1]))
    return events


def _contexts(counts: NDArray[np.uint32], share: float) -> NDArray[np.uint8]:
    """The first exponents of contexts: neighbours are joined while that costs less than a context does.

    ``counts``, ``[256, fine classes]``, are of differences by exponent; coding them costs their entropy.
    """
    coarse = [*range(16), *range(16, 32, 4), *range(32, counts.shape[1], 8)]
    values = np.add.reduceat(counts, coarse, axis=1, dtype=np.int64)
    price = _SYMBOL_BITS * share
    seen = np.flatnonzero(values.sum(axis=1))
    groups = [values[exponent] for exponent in seen]
    starts = [int(exponent) for exponent in seen]
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
    return np.array([0, *starts[1:]], np.uint8)


def _bits(counts: NDArray[Any], price: float = 0.0) -> float:
    """The entropy of counted symbols by context, in bits, and the ``price`` of each in the table."""
    whole, some = counts.sum(axis=-1, dtype=np.float64), counts[counts > 0].astype(np.float64)
    entropy = (whole * np.log2(np.maximum(whole, 1))).sum() - (some * np.log2(some)).sum()
    return float(entropy) + price * len(some)


def _alphabet(counts: NDArray[np.int64], width: int, share: float) -> Alphabet:
    """The symbols that code numbers of ``width`` bits in fewest bits, and their frequencies.

    ``counts``, ``[contexts, fine classes]``, may have one more class: that of `NEVER`. Numbers of classes
    that do not occur are coded by a last symbol, which is in all contexts, and stands for every number.
    """
    first, bits = fine_classes(width)
    price = _SYMBOL_BITS * share
    while True:
        levels = _levels(counts[:, : len(first)], price)
        starts = np.flatnonzero(np.arange(len(first)) % (1 << levels) == 0)
        starts = starts[np.add.reduceat(counts[:, : len(first)], starts, axis=1).any(axis=0)]
        if len(starts) < _MOST_SYMBOLS - 1:
            break
        price *= 2
    ends = starts + (1 << levels[starts])
    joined = [counts[:, start:end].sum(axis=1) for start, end in zip(starts, ends, strict=True)]
    plain = bits[starts] + levels[starts].astype(np.uint64)
    tops = (first[starts] >> plain).astype(np.uint32)
    more = [(NEVER, 0, counts[:, -1])] if counts.shape[1] > len(first) else []
    more.append((0, width, np.zeros(len(counts), np.int64)))
    return Alphabet(
        np.append(tops, [top for top, _, _ in more]).astype(np.uint32),
        np.append(plain, [extra for _, extra, _ in more]).astype(np.uint8),
        _rounded(np.stack([*joined, *(np.maximum(counted, 1) for _, _, counted in more)], axis=1)),
    )


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


def pack(tables: Iterable[FrequencyTable]) -> bytes:
    """Tables as bytes, compressed by zstd."""
    parts = list[bytes]()
    for table in tables:
        alphabets = [table.values] if table.gaps is None else [table.gaps, table.values]
        sizes = [0 if table.gaps is None else len(table.gaps.bits), len(table.values.bits)]
        parts += [bytes([len(table.starts)]), np.array(sizes, "<u2").tobytes(), table.starts.tobytes()]
        for one in alphabets:
            parts += [
                one.tops.astype("<u4").tobytes(),
                one.bits.tobytes(),
                one.frequencies.astype("<u2").tobytes(),
            ]
    return compress(b"".join(parts), 19)


def unpack(packed: bytes, most: int) -> list[FrequencyTable]:
    """The inverse of `pack`, of ``most`` tables or fewer. Raises a ``ValueError`` if they are damaged."""
    size = content_size(packed)
    if size > min(most, MOST_TABLES) * _MOST_BYTES:
        raise ValueError("the tables are too large")
    raw, place, tables = decompress(packed, size), 0, list[FrequencyTable]()

    def take(kind: str, *shape: int) -> NDArray[Any]:
        nonlocal place
        start, place = place, place + int(np.prod(shape)) * np.dtype(kind).itemsize
        if place > len(raw):
            raise ValueError("the tables are cut off")
        return np.frombuffer(raw[start:place], kind).reshape(shape)

    def alphabet(count: int, used: int) -> Alphabet:
        found = Alphabet(take("<u4", used), take("u1", used), take("<u2", count, used))
        if used > _MOST_SYMBOLS or (found.bits > 64).any():
            raise ValueError("the tables have unknown symbols")
        if (found.frequencies.sum(axis=1, dtype=np.int64) != _TOTAL).any():
            raise ValueError("the tables have other frequencies")
        return found

    while place < len(raw):
        (count,) = take("u1", 1).tolist()
        gaps, values = take("<u2", 2).tolist()
        starts = take("u1", count)
        if not 1 <= count <= MOST_CONTEXTS or starts[0] != 0 or (np.diff(starts.astype(int)) <= 0).any():
            raise ValueError("the tables have other contexts")
        tables.append(
            FrequencyTable(starts, alphabet(count, gaps) if gaps else None, alphabet(count, values))
        )
    if len(tables) > min(most, MOST_TABLES):
        raise ValueError("the tables are too many")
    return tables
