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

from ..quantization.codes import CODE_BITS, code_table
from ..quantization.weight import CodedWeight
from ..tensors.arrays import Float64Array, Int64Array, RawBytes
from ..tensors.compiled import compiled
from . import kernels

_PAIRS = 16  # bytes of two codes per word of sums
# Where the sums begin in it, after that of x x: of e e, of x e with an offset, of how many codes differ.
_EE, _XE, _DIFFERING = 13, 28, 44
_OFFSET = 1024

u8, u64 = np.uint8, np.uint64
_bits = kernels.bitcast(types.float64, types.uint64)


# Indices are unsigned: the compiler sees that none is negative, and vectorises.
@compiled()
def _pair_sums(a: Any, b: Any, length: int, words: Any, unit: float, sums: Any, changed: Any) -> None:
    """As `kernels.run_sums`, of runs of bytes of two codes; ``words`` and ``unit`` of `pair_table`."""
    for run in range(changed.size):
        xx, ee, xe, differing = 0, 0, 0, 0
        for first in range(run * length, (run + 1) * length, _PAIRS):
            total = u64(0)
            for i in range(_PAIRS):  # of constant length, to be unrolled: gathers would be slower
                one, other = u64(a[u64(first + i)]), u64(b[u64(first + i)])
                total = u64(total + words[u64(u64(one << u64(8)) | other)])
            word = np.int64(total)
            xx += word & ((1 << _EE) - 1)
            ee += (word >> _EE) & ((1 << (_XE - _EE)) - 1)
            xe += ((word >> _XE) & ((1 << (_DIFFERING - _XE)) - 1)) - _OFFSET * _PAIRS
            differing += word >> _DIFFERING
        sums[0, run], sums[1, run], sums[2, run], changed[run] = unit * xx, unit * ee, unit * xe, differing


@compiled(fastmath=kernels.FASTMATH)
def _scaled_sums(
    a: Any, b: Any, scales: Any, near: float, numbers: Any, groups: Any, unequal: Any, sums: Any, changed: Any
) -> None:
    """The sums of rows from those of the codes of their ``groups``, of which ``unequal`` differ.

    ``scales``: of both sides, float64 ``[n, groups of a row]``; ``numbers``: of bytes, see `code_table`.
    """
    shift, width = u64(numbers.size >> 9), a.size // unequal.size
    for row in range(changed.size):
        aa, dd, ad, differing = 0.0, 0.0, 0.0, 0
        for place in range(scales[0].shape[1]):
            group = row * scales[0].shape[1] + place
            start, stop = u64(group * width), u64((group + 1) * width)
            s, t = scales[0][row, place], scales[1][row, place]
            moved = t - s
            if s != 0.0 and abs(moved) <= near * abs(t):
                xx, ee, xe = groups[0, group], groups[1, group], groups[2, group]
                aa += s * s * xx
                dd += t * t * ee + moved * (2.0 * t * xe + moved * xx)
                ad += s * (t * xe + moved * xx)
                least = u8(0 if moved == 0.0 else 0x7F)
                if moved != 0.0:  # then all numbers differ but zeros, of which most groups have none
                    for i in range(start, stop):
                        least = min(least, u8(a[i] & u8(0x7F)))
                differing += unequal[group] if least == u8(0) else width
                if moved != 0.0 and least == u8(0):
                    for i in range(start, stop):
                        differing += a[i] == b[i] and u8(a[i] & u8(0x7F)) != u8(0)
            else:
                for half in range(1 + shift):
                    for i in range(start, stop):
                        x = numbers[u64(u64(u64(a[i]) << shift) + u64(half))] * s
                        y = numbers[u64(u64(u64(b[i]) << shift) + u64(half))] * t
                        aa += x * x
                        dd += (y - x) * (y - x)
                        ad += x * (y - x)
                        differing += _bits(x) != _bits(y)
        sums[0, row], sums[1, row], sums[2, row], changed[row] = aa, dd, ad, differing


@functools.cache
def pair_table(kind: str) -> tuple[NDArray[np.uint64], float]:
    """The sums of each two bytes of two codes, in words; and the unit of the squares in them."""
    numbers, size = (
        code_table(kind)[0].reshape(256, 2),
        2 if kind == "E2M1" else 1,
    )  # whole numbers if doubled
    whole, negative = (size * numbers).astype(np.int64), np.signbit(numbers)
    x, y = whole[:, None], whole[None]
    differ = (x != y) | (negative[:, None] != negative[None])
    words = (x * x) + ((y - x) ** 2 << _EE) + (x * (y - x) << _XE) + (differ.astype(np.int64) << _DIFFERING)
    return (words.sum(axis=2) + (_OFFSET << _XE)).astype(np.uint64).reshape(-1), size**-2


def code_sums(
    kind: str, a: RawBytes, b: RawBytes, scales: tuple[Float64Array, Float64Array], width: int
) -> tuple[Float64Array, Int64Array]:
    """As `kernels.run_sums`, of rows of codes of which ``width`` bytes share one of ``scales``."""
    (numbers, per_byte), rows = code_table(kind), len(scales[0])
    run = math.gcd(a.size // rows, width)  # the last group of a row may be shorter
    if run < width:
        first, second = (side.repeat(width // run, axis=1)[:, : a.size // rows // run] for side in scales)
        scales = first, second
    groups, unequal, near = np.empty((3, a.size // run)), np.empty(a.size // run, np.int64), 0.0
    if per_byte == 2:
        _pair_sums(a, b, run, *pair_table(kind), groups, unequal)
    else:
        near = 0.5 ** (CODE_BITS[kind] + 1)  # half of how far codes of one sign are apart, at least
        kernels.run_sums(kind)(a, b, run, groups, unequal)
    sums, changed = np.empty((3, rows)), np.empty(rows, np.int64)
    _scaled_sums(a, b, scales, near, numbers, groups, unequal, sums, changed)
    return sums, changed


def row_sums(
    codes: tuple[CodedWeight, CodedWeight], rows: Int64Array, a: RawBytes, b: RawBytes
) -> tuple[Float64Array, Int64Array]:
    """The sums of ``rows`` of a weight, whose codes are ``a`` and ``b``."""
    weight = codes[0].weight
    first, second = (one.weight.scale_rows(one.files, rows) for one in codes)
    return code_sums(weight.kind, a, b, (first, second), weight.columns // code_table(weight.kind)[1])


def prepare(kinds: Iterable[str]) -> None:
    """Compile, or load from the cache on disk, the kernels for these kinds of codes."""
    for kind in sorted(set(kinds)):
        code_sums(kind, *np.zeros((2, _PAIRS), np.uint8), (np.ones((1, 1)), np.ones((1, 1))), _PAIRS)
