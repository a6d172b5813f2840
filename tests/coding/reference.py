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


def least(number_class: int) -> tuple[int, int]:
    """The least number of a class, and how many plain bits follow."""
    if number_class < 16:
        return number_class, 0
    top, part = divmod(number_class, 4)  # the place of the highest bit; the two bits below it
    return (4 + part) << (top - 2), top - 2


class Bits:
    """Plain bits, the lowest of a number first, in 32-bit words."""

    def __init__(self, words: Sequence[int]) -> None:
        self._number = sum(word << (32 * place) for place, word in enumerate(words))
        self._left = 32 * len(words)

    def take(self, count: int) -> int:
        assert self._left >= count
        found, self._number = self._number & ((1 << count) - 1), self._number >> count
        self._left -= count
        return found

    @property
    def done(self) -> bool:
        return self._left < 32 and self._number == 0


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


def decode(
    dtype: str,
    base: Sequence[int],
    code: bytes,
    contexts: Sequence[int],
    gaps: Sequence[Sequence[int]],
    values: Sequence[Sequence[int]],
) -> list[int]:
    """The block that ``code`` stands for; without ``gaps`` every element has its difference."""
    (count,) = struct.unpack_from("<I", code)
    middle = 4 + 4 * ((count + 1) // 2)  # an odd number of words is followed by two zero bytes
    assert not count % 2 or code[middle - 2 : middle] == bytes(2)
    words = iter(struct.unpack_from(f"<{count}H", code, 4))
    bits = Bits(struct.unpack(f"<{(len(code) - middle) // 4}I", code[middle:]))
    states = [Symbols(words), Symbols(words)]

    def number(symbol: int) -> int:
        start, extra = least(symbol)
        return start + bits.take(extra)

    out = list(base)
    if not gaps:
        for i, element in enumerate(base):
            symbol = states[i % 2].take(values[contexts[exponent(dtype, element)]])
            out[i] = moved(dtype, element, number(symbol))
    else:

        def gap(context: int) -> float:
            symbol = states[0].take(gaps[context])
            return number(symbol - 1) if symbol else float("inf")

        left = [gap(context) for context in range(len(values))]
        for i, element in enumerate(base):
            context = contexts[exponent(dtype, element)]
            if left[context] == 0:
                out[i] = moved(dtype, element, 1 + number(states[1].take(values[context])))
                left[context] = gap(context)
            else:
                left[context] -= 1
    assert [state.state for state in states] == [1 << 15, 1 << 15]
    assert next(words, None) is None
    assert bits.done
    return out
