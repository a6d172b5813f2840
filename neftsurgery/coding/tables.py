"""Frequencies of symbols: counted, rounded to what rANS needs, and stored with the code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compression import compress, content_size, decompress
from .elements import CLASSES, FINE, HASH, PRECISION, fine_classes

_TOTAL = 1 << PRECISION
MOST_CONTEXTS = 32
MOST_SYMBOLS = 256
#: Tables of a delta.
MOST_TABLES = 1 << 10
_MOST_BYTES = 5 + MOST_CONTEXTS + 2 * MOST_SYMBOLS * (5 + 2 * MOST_CONTEXTS)  # of a table


@dataclass(frozen=True, eq=False)
class Alphabet:
    """Symbols and their frequencies. Each stands for the numbers from ``least`` on that plain bits reach."""

    tops: NDArray[np.uint32]  # of each symbol, ``least`` without its plain bits
    bits: NDArray[np.uint8]  # how many plain bits
    frequencies: NDArray[np.uint16]  # ``[contexts, symbols]``; they sum to 2^PRECISION per context

    @property
    def least(self) -> NDArray[np.uint64]:
        """The least number of each symbol."""
        return self.tops.astype(np.uint64) << self.bits.astype(np.uint64)

    @cached_property
    def encoding(self) -> tuple[NDArray[np.uint64], NDArray[np.uint16], *tuple[NDArray[np.uint64], ...]]:
        """A hash table of single numbers; places of classes, by context; least numbers; plain bits; entries.

        A place is 256 times the context plus the symbol. The entry of a place is what puts its symbol into a
        state: from which state on a word goes; a factor and a shift, which divide by the frequency; and
        2^PRECISION less the frequency, plus 2^16 times the start.
        """
        from .kernels import enter

        first, plain = fine_classes(64)
        lasts = first + (np.uint64(1) << plain) - np.uint64(1)
        least, count = self.least, len(self.frequencies)
        ends = least + np.array([(1 << int(bits)) - 1 for bits in self.bits], np.uint64)
        single = least[(self.bits == 0) & (least >= 1 << FINE)]
        hot = np.empty((1 << HASH) * (len(single) > 0), np.uint64)
        if len(single):
            enter(single, hot)
        inside = np.searchsorted(first, least), np.searchsorted(lasts, ends, "right")
        places = np.zeros((count, CLASSES + len(hot)), np.uint16)
        used, rows = self.frequencies > 0, (np.arange(count, dtype=np.uint16) << np.uint16(8))[:, None]
        for symbol in np.argsort(self.bits, kind="stable")[::-1]:  # the narrowest that fits
            where = used[:, symbol]
            places[where, inside[0][symbol] : inside[1][symbol]] = symbol
            if len(hot):
                covered = np.flatnonzero((hot >= least[symbol]) & (hot <= ends[symbol])) + CLASSES
                if len(covered):
                    places[np.ix_(where, covered)] = symbol
        wide = np.zeros((count, MOST_SYMBOLS), np.uint64)
        wide[:, : len(least)] = np.maximum(self.frequencies, 1)
        wide = np.maximum(wide, 1)
        shift = 32 + np.ceil(np.log2(wide)).astype(np.uint64)
        factor = (np.uint64(1) << shift) // wide
        factor += (factor * wide) != (np.uint64(1) << shift)  # rounded up
        starts = np.zeros_like(wide)
        starts[:, : len(least)] = np.cumsum(self.frequencies, axis=1, dtype=np.uint64) - self.frequencies
        last = (np.uint64(1 << PRECISION) - wide) | starts << np.uint64(16)
        entries = np.stack([wide << np.uint64(31 - PRECISION), factor, shift, last], axis=2).reshape(-1, 4)
        places |= rows
        return hot, places, least, self.bits.astype(np.uint64), entries

    @lru_cache(maxsize=64)  # noqa: B019
    def decoding(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint64]]:
        """The least number of each symbol; the symbol of each slot, and what a symbol does, both by context.

        That is frequency, start, plain bits and the symbol, from bits 0, 16, 32 and 40 on.
        """
        count, used = self.frequencies.shape
        slots = np.concatenate([np.repeat(np.arange(used), row) for row in self.frequencies]).astype(np.uint8)
        wide = self.frequencies.astype(np.uint64)
        entries, least = np.zeros((count, MOST_SYMBOLS), np.uint64), np.zeros(MOST_SYMBOLS, np.uint64)
        starts = np.cumsum(wide, axis=1, dtype=np.uint64) - wide
        symbols = np.arange(used, dtype=np.uint64)
        plain = self.bits.astype(np.uint64)
        entries[:, :used] = wide | starts << np.uint64(16) | plain << np.uint64(32) | symbols << np.uint64(40)
        least[:used] = self.least
        return least, slots, entries.reshape(-1)


@dataclass(frozen=True, eq=False)
class FrequencyTable:
    """The frequencies that code the blocks of one kind of tensor."""

    starts: NDArray[np.uint8]  # the first exponents of the contexts
    gaps: Alphabet | None  # None: every element has its value
    values: Alphabet

    @cached_property
    def contexts(self) -> NDArray[np.uint8]:
        """The context of each exponent."""
        return contexts_of(self.starts)


def contexts_of(starts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The context of each exponent."""
    return (np.searchsorted(starts, np.arange(256), "right") - 1).astype(np.uint8)


def pack(tables: Iterable[FrequencyTable]) -> bytes:
    """Tables as bytes, compressed by zstd."""
    parts = list[bytes]()
    for table in tables:
        alphabets = [table.values] if table.gaps is None else [table.gaps, table.values]
        sizes = [0 if table.gaps is None else len(table.gaps.bits), len(table.values.bits)]
        parts += [bytes([len(table.starts)]), np.array(sizes, "<u2").tobytes(), table.starts.tobytes()]
        for one in alphabets:
            arrays = one.tops.astype("<u4"), one.bits, one.frequencies.astype("<u2")
            parts += [array.tobytes() for array in arrays]
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
        if used > MOST_SYMBOLS or (found.bits > 64).any():
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
        first = alphabet(count, gaps) if gaps else None
        tables.append(FrequencyTable(starts, first, alphabet(count, values)))
    if len(tables) > min(most, MOST_TABLES):
        raise ValueError("the tables are too many")
    return tables
