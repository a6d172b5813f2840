"""A slow reader of coded blocks in plain integers, written from the definitions of the format alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

#: Exponent bits and fraction bits of the float types.
FLOATS = {
    "F64": (11, 52), "F32": (8, 23), "C64": (8, 23), "BF16": (8, 7), "F16": (5, 10), "F8_E4M3": (4, 3),
    "F8_E5M2": (5, 2), "F8_E4M3FNUZ": (4, 3), "F8_E5M2FNUZ": (5, 2),
}  # fmt: skip
#: Bits of the unsigned integers that stand for elements; types of fewer bits are taken as bytes.
WIDTHS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 32, "F32": 32, "I32": 32, "U32": 32, "BF16": 16, "F16": 16,
    "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "U8": 8, "I8": 8, "BOOL": 8, "F4": 8, "F6_E2M3": 8, "F6_E3M2": 8,
}  # fmt: skip


def exponent(dtype: str, bits: int) -> int:
    """What predicts a change: the highest eight bits of a float's exponent; 0 for other types."""
    if dtype not in FLOATS:
        return 0
    wide, fraction = FLOATS[dtype]
    found = (bits >> fraction) & ((1 << wide) - 1)
    return found >> max(0, wide - 8)


def place(dtype: str, bits: int) -> int:
    """The place of an element in the order of its type's values."""
    if dtype not in FLOATS:
        return bits
    top = 1 << (WIDTHS[dtype] - 1)
    return 2 * top - 1 - bits if bits & top else bits + top


def unplace(dtype: str, number: int) -> int:
    """The element at a place: the inverse of `place`."""
    if dtype not in FLOATS:
        return number
    top = 1 << (WIDTHS[dtype] - 1)
    return number - top if number >= top else 2 * top - 1 - number


def moved(dtype: str, base: int, zigzag: int) -> int:
    """The element at a zigzag difference (0, -1, 1, -2, 2, ... for 0, 1, 2, 3, 4, ...) from ``base``."""
    step = -((zigzag + 1) // 2) if zigzag % 2 else zigzag // 2
    return unplace(dtype, (place(dtype, base) + step) % (1 << WIDTHS[dtype]))


class Bits:
    """Plain bits, the lowest of a number first, in 32-bit words."""

    def __init__(self, words: Sequence[int]) -> None:
        self._number = sum(word << (32 * place) for place, word in enumerate(words))
        self._size = 32 * len(words)
        self.taken = 0

    def take(self, count: int) -> int:
        self.taken += count
        assert self.taken <= self._size
        return (self._number >> (self.taken - count)) & ((1 << count) - 1)

    @property
    def skipped_are_zero(self) -> bool:
        """Whether the bits that remain in the last word are 0."""
        return not (self._number >> self.taken) & ((1 << -self.taken % 32) - 1)


class Symbols:
    """The symbols in one rANS state; words are shared with the other one."""

    def __init__(self, words: Iterator[int]) -> None:
        self._words = words
        self.state = (next(words) << 16) | next(words)

    def take(self, frequencies: Sequence[int]) -> int:
        slot, start, symbol = self.state % 4096, 0, 0
        while slot >= start + frequencies[symbol]:
            start += frequencies[symbol]
            symbol += 1
        self.state = frequencies[symbol] * (self.state // 4096) + slot - start
        if self.state < 1 << 15:
            self.state = (self.state << 16) | next(self._words)
        return symbol


#: Symbols as pairs of top and plain bits, and their frequencies by context.
Alphabet = tuple[Sequence[tuple[int, int]], Sequence[Sequence[int]]]


def decode(
    dtype: str,
    base: Sequence[int],
    code: bytes,
    starts: Sequence[int],
    gaps: Alphabet | None,
    values: Alphabet,
) -> list[int]:
    """The block that ``code`` stands for; without ``gaps`` every element has its difference."""
    assert len(code) % 4 == 0
    words = iter(struct.unpack(f"<{len(code) // 2}H", code))
    bits = Bits(struct.unpack(f"<{len(code) // 4}I", code)[::-1])
    states = [Symbols(words) for _ in range(4 if gaps is None else 2)]

    def context(element: int) -> int:
        return max(k for k, start in enumerate(starts) if start <= exponent(dtype, element))

    def number(state: Symbols, alphabet: Alphabet, where: int) -> int:
        symbols, frequencies = alphabet
        top, plain = symbols[state.take(frequencies[where])]
        return ((top << plain) + bits.take(plain)) % (1 << (32 if alphabet is gaps else WIDTHS[dtype]))

    out = list(base)
    if gaps is None:
        for i, element in enumerate(base):
            out[i] = moved(dtype, element, number(states[i % 4], values, context(element)))
    else:
        left = [number(states[0], gaps, where) for where in range(len(starts))]
        for i, element in enumerate(base):
            where = context(element)
            if left[where] == 0:
                out[i] = moved(dtype, element, number(states[1], values, where))
                left[where] = number(states[0], gaps, where)
            else:
                left[where] -= 1
    assert all(state.state == 1 << 15 for state in states)
    rest = list(words)  # padding, and the extras once more
    assert bits.skipped_are_zero
    extras = 2 * -(-bits.taken // 32)
    assert len(rest) - extras in (0, 1)
    assert not any(rest[: len(rest) - extras])
    return out
