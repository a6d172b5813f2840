"""Sums of quantized weights from their codes and scales: the numbers are never written to memory.

A number is ``code * scale``. Where ``s`` and ``t`` are the scales of a group of codes ``x`` and ``y``, the
change is ``d = t y - s x = t e + (t - s) x``, with ``e = y - x``: its sums follow from those of the codes.
Those are exact enough where the scales are near. Else other codes may stand for equal numbers, and each
number is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from ..quantization.weight import E8M0, CodedWeight, code_table
from ..tensors.arrays import Float64Array, Int64Array, RawBytes
from ..tensors.compiled import compiled
from . import kernels

# Of kinds of codes: the unit that sums are of, which is what float16 holds in place of E4M3, or makes whole
# numbers; and half of how far codes of one sign are apart, at least. E5M2 is computed number by number.
_KINDS = {"F8_E4M3": (256.0, 1 / 32), "F8_E5M2": (1.0, -1.0), "E2M1": (0.5, 1 / 8), "offset 4": (1.0, 1 / 32)}
_BLOCK = 1024  # codes per float32 partial sum
_AHEAD = 8192  # bytes: how far ahead memory is prefetched
_PAIRS = 16  # bytes of two codes per word of sums
# Where the sums begin in it, after that of x x: of e e, of x e with an offset; how many codes differ, and how
# many are equal and not zero.
_EE, _XE, _DIFFERING, _EQUAL = 13, 28, 44, 52
_OFFSET, _EVEN = 1024, 0x00FF00FF00FF00FF

f32, i16, i8, u16, u64 = np.float32, np.int16, np.int8, np.uint16, np.uint64
_bits = kernels.bitcast(types.float64, types.uint64)


# Indices are unsigned: the compiler sees that none is negative, and vectorises.
@compiled()
def _halves(codes: Any, start: int, out: Any) -> None:
    """Codes of E4M3 from ``start`` on as bits of float16."""
    for i in range(out.size):
        bits = u16(u16(u16(i16(i8(codes[u64(start + i)]))) << u16(7)) & u16(0xBFFF))
        out[u64(i)] = u16(0x7E00) if u16(bits & u16(0x3F80)) == u16(0x3F80) else bits


@compiled(fastmath=kernels.FASTMATH)
def _float_groups(codes: Any, begin: int, s: Any, t: Any, halves: Any, groups: Any) -> None:
    """The sums of the groups of a row, and how many numbers differ. ``s``, ``t``: their scales."""
    (a, b), (xs, ys) = codes, halves
    _halves(a, begin, xs)
    _halves(b, begin, ys)
    width = xs.size // s.size
    for place in range(s.size):
        xx, ee, xe, differing, end = 0.0, 0.0, 0.0, 0, (place + 1) * width
        zero = u16(0 if s[place] == t[place] else 0x7FFF)  # of two scales, only zeros are equal
        for start in range(place * width, end, _BLOCK):
            x_block, y_block = xs[start : min(start + _BLOCK, end)], ys[start : min(start + _BLOCK, end)]
            for soon in range(begin + start + _AHEAD, begin + start + _AHEAD + x_block.size, kernels.LINE):
                kernels.prefetch(a, soon)
                kernels.prefetch(b, soon)
            xx32, ee32, xe32, count = f32(0), f32(0), f32(0), u16(0)
            for i in range(x_block.size):
                x: Any = kernels.half(x_block[i])
                e = kernels.half(y_block[i]) - x
                xx32 += x * x
                ee32 += e * e
                xe32 += x * e
            for i in range(x_block.size):  # by itself, it takes more of them at once
                if u16(u16(x_block[i] ^ y_block[i]) | u16(x_block[i] & zero)) != u16(0):
                    count = u16(count + u16(1))
            xx += xx32
            ee += ee32
            xe += xe32
            differing += count
        groups[0, place], groups[1, place], groups[2, place], groups[3, place] = xx, ee, xe, differing


@compiled()
def _pair_groups(codes: Any, begin: int, s: Any, t: Any, words: Any, found: Any, groups: Any) -> None:
    """As `_float_groups`, of groups of 16 bytes of two codes; ``words`` of `pair_table`."""
    for place in range(s.size):
        first, total = u64(begin // 8 + 2 * place), u64(0)
        for i in range(2):
            x, y = codes[0][first + u64(i)], codes[1][first + u64(i)]
            even = u64(u64(u64(x & u64(_EVEN)) << u64(8)) | u64(y & u64(_EVEN)))
            odd = u64(u64(x & u64(~_EVEN)) | u64(u64(y >> u64(8)) & u64(_EVEN)))
            for bit in range(0, 64, 16):
                total = u64(total + words[u64(u64(even >> u64(bit)) & u64(0xFFFF))])
                total = u64(total + words[u64(u64(odd >> u64(bit)) & u64(0xFFFF))])
        found[place] = np.int64(total)
    for i in range(s.size):  # by itself, it is vectorised
        place, word = u64(i), found[u64(i)]
        groups[0, place] = word & ((1 << _EE) - 1)
        groups[1, place] = (word >> _EE) & ((1 << (_XE - _EE)) - 1)
        groups[2, place] = ((word >> _XE) & ((1 << (_DIFFERING - _XE)) - 1)) - _OFFSET * _PAIRS
        equal = 0 if s[place] == t[place] else word >> _EQUAL
        groups[3, place] = ((word >> _DIFFERING) & ((1 << (_EQUAL - _DIFFERING)) - 1)) + equal


@compiled(fastmath=kernels.FASTMATH)
def _sums(
    codes: Any, scales: Any, rows: Any, values: Any, near: float, numbers: Any, words: Any
) -> tuple[Float64Array, Int64Array]:
    """As `code_sums`, of bytes of floats, or of 64-bit words of pairs, if there are ``words``."""
    raw, count, places = (codes[0].view(np.uint8), codes[1].view(np.uint8)), rows[0].size, scales[0].shape[1]
    sums, changed, found = np.empty((3, count)), np.empty(count, np.int64), np.empty(places, np.int64)
    groups, s, t, length = np.empty((4, places)), np.empty(places), np.empty(places), raw[0].size // count
    halves, width = (np.empty(length, np.uint16), np.empty(length, np.uint16)), length // places
    shift = u64(numbers.size >> 9)
    for row in range(count):
        s[:], t[:] = scales[0][rows[0][row]], scales[1][rows[1][row]]
        if values is not None:
            for i in range(places):
                s[i], t[i] = values[u64(s[i])], values[u64(t[i])]
        if words is None:
            _float_groups(raw, row * length, s, t, halves, groups)
        else:
            _pair_groups(codes, row * length, s, t, words, found, groups)
        aa, dd, ad, differing = 0.0, 0.0, 0.0, 0.0
        for place in range(places):
            if s[place] != 0.0 and abs(t[place] - s[place]) <= near * abs(t[place]):
                continue
            start = row * length + place * width
            for half in range(1 + shift):
                for i in range(start, start + width):
                    x = numbers[u64(u64(u64(raw[0][u64(i)]) << shift) + u64(half))] * s[place]
                    y = numbers[u64(u64(u64(raw[1][u64(i)]) << shift) + u64(half))] * t[place]
                    aa += x * x
                    dd += (y - x) * (y - x)
                    ad += x * (y - x)
                    differing += _bits(x) != _bits(y)
            s[place] = t[place] = groups[3, place] = 0.0  # nothing more of it is added
        for i in range(places):
            moved, xx, xe = t[i] - s[i], groups[0, i], groups[2, i]
            aa += s[i] * s[i] * xx
            dd += t[i] * t[i] * groups[1, i] + moved * (2.0 * t[i] * xe + moved * xx)
            ad += s[i] * (t[i] * xe + moved * xx)
            differing += groups[3, i]
        sums[0, row], sums[1, row], sums[2, row], changed[row] = aa, dd, ad, differing
    return sums, changed


@functools.cache
def pair_table(kind: str) -> NDArray[np.uint64]:
    """The sums of each two bytes of two codes, in words."""
    numbers = (code_table(kind)[0] / f32(_KINDS[kind][0])).reshape(256, 2)
    whole, negative = numbers.astype(np.int64), np.signbit(numbers)
    x, y = whole[:, None], whole[None]
    equal = (x == y) & (negative[:, None] == negative[None])
    words = (x * x) + ((y - x) ** 2 << _EE) + (x * (y - x) << _XE)
    words += np.where(equal, (x != 0).astype(np.int64) << _EQUAL, 1 << _DIFFERING)
    return np.asarray(words.sum(axis=2) + (_OFFSET << _XE), np.uint64).reshape(-1)


def code_sums(
    kind: str,
    codes: tuple[RawBytes, RawBytes],
    scales: tuple[NDArray[Any], NDArray[Any]],
    rows: tuple[Int64Array, Int64Array],
    width: int,
    values: Float64Array | None = None,
) -> tuple[Float64Array, Int64Array]:
    """As `kernels.run_sums`, of rows of codes of which ``width`` bytes share a scale.

    ``scales``: ``[n, groups of a row]``, or indices of ``values``; ``rows``: which of these each row has.
    """
    (numbers, per_byte), (unit, near), words = code_table(kind), _KINDS[kind], None
    length = codes[0].size // len(rows[0])
    run = _PAIRS if per_byte == 2 else math.gcd(length, width)  # the last group of a row may be shorter
    if run < width:
        first, second = (side.repeat(width // run, axis=1)[:, : length // run] for side in scales)
        scales = first, second
    if per_byte == 2:
        words = pair_table(kind)
        a, b = (np.require(side.view(np.uint64), requirements="A") for side in codes)
        codes = a, b
    sums, changed = _sums(codes, scales, rows, values, near, numbers / f32(unit), words)
    return sums * unit**2, changed


def row_sums(
    codes: tuple[CodedWeight, CodedWeight], rows: Int64Array, a: RawBytes, b: RawBytes
) -> tuple[Float64Array, Int64Array]:
    """The sums of ``rows`` of a weight, whose codes are ``a`` and ``b``."""
    weight, values = codes[0].weight, E8M0 if codes[0].weight.kind == "E2M1" else None
    read = [one.weight.scale_rows(one.files, rows, decoded=values is None) for one in codes]
    width = weight.columns // code_table(weight.kind)[1]
    return code_sums(weight.kind, (a, b), (read[0][0], read[1][0]), (read[0][1], read[1][1]), width, values)


def prepare(kinds: Iterable[str]) -> None:
    """Compile, or load from the cache on disk, the kernels for these kinds of codes."""
    code, row = np.zeros(_PAIRS, np.uint8), np.zeros(1, np.int64)
    for kind in sorted(set(kinds)):
        scale, values = (np.ones((1, 1), np.uint8), E8M0) if kind == "E2M1" else (np.ones((1, 1)), None)
        code_sums(kind, (code, code), (scale, scale), (row, row), _PAIRS, values)
