"""Frequencies of symbols: counted, rounded to what rANS needs, and stored with the code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..tensors.arrays import Int64Array
from .compression import compress, content_size, decompress
from .elements import CLASSES, GAPS, PRECISION, Carrier, Elements

__all__ = ["MOST_TABLES", "Events", "FrequencyTable", "events", "fit", "pack", "unpack"]

_TOTAL = 1 << PRECISION
#: What a context takes in the stored table, about, compressed.
_CONTEXT_BITS = 400
MOST_CONTEXTS = 32
#: Tables of a delta.
MOST_TABLES = 1 << 12
_MOST_BYTES = 258 + 2 * MOST_CONTEXTS * (GAPS + CLASSES)  # of a table


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The frequencies that code the blocks of one kind of tensor.

    ``contexts``, uint8 ``[256]``, gives each exponent its context. ``gaps``, uint16 ``[contexts, GAPS]``, and
    ``values``, uint16 ``[contexts, CLASSES]``, sum to 2^PRECISION per context. If there are no ``gaps``,
    ``[0, GAPS]``, every element has its value.
    """

    contexts: NDArray[np.uint8]
    gaps: NDArray[np.uint16]
    values: NDArray[np.uint16]

    @property
    def dense(self) -> bool:
        """Whether every element is coded, not only changes."""
        return len(self.gaps) == 0

    @cached_property
    def encoding(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Of gaps and values: how each symbol is put into a state, ``[contexts, symbols, 4]``."""
        return _coding(self.gaps), _coding(self.values)

    @lru_cache(maxsize=64)  # noqa: B019
    def decoding(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Of gaps and values: what each slot stands for, ``[contexts, 2^PRECISION]``."""
        return _slots(self.gaps), _slots(self.values)


def _coding(frequencies: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """Start, frequency, and what divides a state below 2^31 by the frequency: a factor and a shift."""
    wide = frequencies.astype(np.uint64)
    shift = 32 + np.ceil(np.log2(np.maximum(wide, 1))).astype(np.uint64)
    factor = (np.uint64(1) << shift) // np.maximum(wide, 1)
    factor += (factor * np.maximum(wide, 1)) != (np.uint64(1) << shift)  # rounded up
    return np.stack([np.cumsum(wide, axis=1, dtype=np.uint64) - wide, wide, factor, shift], axis=2)


def _slots(frequencies: NDArray[np.uint16]) -> NDArray[np.uint32]:
    found = np.zeros((len(frequencies), _TOTAL), np.uint32)
    symbols = np.arange(frequencies.shape[1], dtype=np.uint32)
    for row, counts in zip(found, frequencies.astype(np.int64), strict=True):
        symbol, frequency = np.repeat(symbols, counts), np.repeat(counts, counts)
        place = np.arange(_TOTAL) - np.repeat(np.cumsum(counts) - counts, counts)
        row[:] = (symbol << 24) | ((frequency - 1) << 12).astype(np.uint32) | place.astype(np.uint32)
    return found


def fit(pairs: Sequence[tuple[Carrier, Carrier]], elements: Elements, share: float = 1.0) -> FrequencyTable:
    """The table for blocks like ``pairs`` of base and tuned elements, which are a ``share`` of them all.

    Blocks that are not alike can be coded, too.
    """
    from .kernels import find_changes, find_values  # numba takes long to import, and most commands need none

    exponents = np.arange(256, dtype=np.uint8)
    values = np.zeros((256, CLASSES), np.int64)
    room = events(max((len(base) for base, _ in pairs), default=0), elements.size)
    for base, tuned in pairs:
        find_values(base, tuned, elements.rules, exponents, room)
        values += _counted(room[0], room[3], len(base), values.shape)
    dense = 2 * int(values[:, 0].sum()) < int(values.sum())
    contexts = _contexts(values, share)
    count = int(contexts[-1]) + 1
    gaps = np.zeros((0 if dense else count, GAPS), np.int64)
    joined = np.zeros((count, CLASSES), np.int64)
    if dense:
        np.add.at(joined, contexts, values)
    else:
        for base, tuned in pairs:
            n = find_changes(base, tuned, elements.rules, contexts, count, room)
            gaps += _counted(room[0], room[1], n, gaps.shape)
            joined += _counted(room[0][count:], room[3][count:], n - count, joined.shape)
    classes = 16 + 4 * (8 * elements.size - 4)  # those of numbers that an element can hold
    return FrequencyTable(contexts, _rounded(gaps, GAPS), _rounded(joined, classes))


def _counted(
    contexts: NDArray[np.uint8], symbols: NDArray[np.uint8], count: int, shape: tuple[int, int]
) -> Int64Array:
    """How often each symbol occurs in each context."""
    places = contexts[:count].astype(np.int64) * shape[1] + symbols[:count]
    return np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)


Events: TypeAlias = tuple[
    NDArray[np.uint8],
    NDArray[np.uint8],
    NDArray[np.int32],
    NDArray[np.uint8],
    Carrier,
]


def events(length: int, size: int) -> Events:
    """Room for the events of `kernels.find_changes` in a block of ``length`` elements of ``size`` bytes."""
    most = length + MOST_CONTEXTS
    small = [np.empty(most, np.uint8) for _ in range(3)]
    return small[0], small[1], np.empty(most, np.int32), small[2], np.empty(most, f"u{max(4, size)}")


def _contexts(values: Int64Array, share: float) -> NDArray[np.uint8]:
    """Exponents to contexts: neighbours are joined while that costs less than a context's place in the table.

    ``values``, ``[256, CLASSES]``, counts differences by exponent; the cost of coding them is their entropy.
    """
    seen = np.flatnonzero(values.sum(axis=1))
    groups = [values[exponent] for exponent in seen]
    starts = [int(exponent) for exponent in seen] or [0]
    costs = [_bits(group) for group in groups]
    joint = [_bits(a + b) for a, b in pairwise(groups)]
    while len(groups) > 1:
        added = [joint[i] - costs[i] - costs[i + 1] for i in range(len(joint))]
        i = int(np.argmin(added))
        if added[i] > _CONTEXT_BITS * share and len(groups) <= MOST_CONTEXTS:
            break
        groups[i : i + 2], costs[i : i + 2] = [groups[i] + groups[i + 1]], [joint[i]]
        del starts[i + 1]
        joint[max(0, i - 1) : i + 2] = [
            _bits(groups[j] + groups[j + 1]) for j in (i - 1, i) if 0 <= j < len(groups) - 1
        ]
    found = np.zeros(256, np.uint8)
    found[starts[1:]] = 1
    return np.cumsum(found).astype(np.uint8)


def _bits(counts: Int64Array) -> float:
    """The entropy of counted symbols, in bits, all together."""
    some = counts[counts > 0].astype(np.float64)
    return float(some.sum() * np.log2(some.sum()) - (some * np.log2(some)).sum())


def _rounded(counts: Int64Array, reachable: int) -> NDArray[np.uint16]:
    """Frequencies that sum to 2^PRECISION per row, at least one for each ``reachable`` symbol."""
    found = np.zeros(counts.shape, np.uint16)
    for row, weights in zip(found, np.maximum(counts[:, :reachable], 1e-9), strict=True):
        share = np.floor(weights * ((_TOTAL - reachable) / weights.sum())).astype(np.uint16)
        row[:reachable] = share + 1
        row[int(np.argmax(row))] += _TOTAL - int(row.sum(dtype=np.int64))
    return found


def pack(tables: Iterable[FrequencyTable]) -> bytes:
    """Tables as bytes, compressed by zstd."""
    parts = []
    for table in tables:
        parts.append(bytes([len(table.values), table.dense]) + table.contexts.tobytes())
        parts += [table.gaps.astype("<u2").tobytes(), table.values.astype("<u2").tobytes()]
    return compress(b"".join(parts), 19)


def unpack(packed: bytes, most: int) -> list[FrequencyTable]:
    """The inverse of `pack`, of ``most`` tables or fewer. Raises a ``ValueError`` if they are damaged."""
    size = content_size(packed)
    if size > min(most, MOST_TABLES) * _MOST_BYTES:
        raise ValueError("the tables are too large")
    raw = decompress(packed, size)
    tables, place = list[FrequencyTable](), 0
    while place < len(raw):
        count, dense = raw[place], raw[place + 1 : place + 2] != b"\0"
        sizes = [256, 0 if dense else 2 * count * GAPS, 2 * count * CLASSES]
        ends = (place + 2 + np.cumsum(sizes)).tolist()
        if not 1 <= count <= MOST_CONTEXTS or ends[-1] > len(raw):
            raise ValueError("the tables are cut off")
        contexts, gaps, values = (
            np.frombuffer(raw[end - part : end], kind)
            for end, part, kind in zip(ends, sizes, ("u1", "<u2", "<u2"), strict=True)
        )
        table = FrequencyTable(contexts, gaps.reshape(-1, GAPS), values.reshape(-1, CLASSES))
        if int(contexts.max()) >= count or any(
            (part.sum(axis=1, dtype=np.int64) != _TOTAL).any() for part in (table.gaps, table.values)
        ):
            raise ValueError("the tables are damaged")
        tables.append(table)
        place = ends[-1]
    return tables
