"""Sums of quantized weights from their codes and scales: the numbers are never written to memory.

A number is ``code * scale``. Where ``s`` and ``t`` are the scales of a group of codes ``x`` and ``y``, the
change is ``d = t y - s x = t (y - x) + (t - s) x``: its sums follow from those of the codes. That is exact
enough where the scales are near. Else numbers of different codes may be equal, and each is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from ..quantization.codes import CODE_BITS, code_table
from ..quantization.weight import CodedWeight
from ..tensors.arrays import Float64Array, Int64Array, RawBytes
from ..tensors.compiled import compiled
from .kernels import FASTMATH, FORMATS, bitcast, widened

#: The kinds of codes as the kernels know them; those below 0 share a byte.
_KINDS = {**FORMATS, "I8": len(FORMATS), "offset 8": len(FORMATS) + 1, "E2M1": -1, "offset 4": -2}
_BLOCK = 1024  # codes of 8 bits per float32 partial sum
PAIRS = 16  # bytes of two codes per sum of fields
# Where its fields begin after that of x x: of e e where e = y - x; of x e, which has an offset;
# of how many codes differ; of how many are zero on both sides.
_EE, _XE, _DIFFERING, _ZEROS = 13, 28, 44, 52
_OFFSET = 1024

u8, u32, u64 = np.uint8, np.uint32, np.uint64
_bits = bitcast(types.float64, types.uint64)


# As in `kernels`, overloads and their implementations carry no annotations. Indices are unsigned: the
# compiler sees that none is negative, and vectorises.
def _number(kind, code):  # type: ignore[no-untyped-def]
    """The value of a code of 8 bits as float32. Compiled by the overload below."""
    raise TypeError("only for compiled code")


@overload(_number)
def _number_overload(kind, code):  # type: ignore[no-untyped-def]
    if not isinstance(kind, types.Literal):
        return None
    number = kind.literal_value
    if number < len(FORMATS):
        return lambda kind, code: widened(number, code)
    flip = u8(0x80 if number == _KINDS["offset 8"] else 0)
    return lambda kind, code: np.float32(np.int8(code ^ flip))


def _code_sums(kind, a, b, start, stop, moved, fields):  # type: ignore[no-untyped-def]
    """The sums of ``x x``, ``e e`` and ``x e`` of some bytes, and how many of their numbers differ."""
    raise TypeError("only for compiled code")


@overload(_code_sums, inline="always")
def _code_sums_overload(kind, a, b, start, stop, moved, fields):  # type: ignore[no-untyped-def]
    if not isinstance(kind, types.Literal):
        return None
    number = kind.literal_value
    zero, mask = u8(0x80 if number == _KINDS["offset 8"] else 0), u8(0x7F if number < len(FORMATS) else 0xFF)

    def of_bytes(kind, a, b, start, stop, moved, fields):  # type: ignore[no-untyped-def]
        xx, ee, xe, changed = 0.0, 0.0, 0.0, 0
        counted = mask if moved else u8(0)  # zeros do not change with their scale
        for first in range(start, stop, _BLOCK):
            xx32, ee32, xe32, count = np.float32(0), np.float32(0), np.float32(0), u32(0)
            for i in range(u64(first), u64(min(first + _BLOCK, stop))):
                x = _number(number, a[i])
                e = _number(number, b[i]) - x
                xx32 += x * x
                ee32 += e * e
                xe32 += x * e
                if u8(u8(a[i] ^ b[i]) | u8(u8(a[i] ^ zero) & counted)) != u8(0):
                    count = u32(count + u32(1))
            xx += xx32
            ee += ee32
            xe += xe32
            changed += count
        return xx, ee, xe, changed

    def of_halves(kind, a, b, start, stop, moved, fields):  # type: ignore[no-untyped-def]
        xx, ee, xe, differing, zeros = 0, 0, 0, 0, 0
        for first in range(start, stop, PAIRS):
            total = u64(0)
            for i in range(PAIRS):  # of constant length, to be unrolled: gathers would be slower
                one, other = u64(a[u64(first + i)]), u64(b[u64(first + i)])
                total = u64(total + fields[u64(u64(one << u64(8)) | other)])
            word = np.int64(total)
            xx += word & ((1 << _EE) - 1)
            ee += (word >> _EE) & ((1 << (_XE - _EE)) - 1)
            xe += ((word >> _XE) & ((1 << (_DIFFERING - _XE)) - 1)) - _OFFSET * PAIRS
            differing += (word >> _DIFFERING) & ((1 << (_ZEROS - _DIFFERING)) - 1)
            zeros += word >> _ZEROS
        changed = 2 * (stop - start) - zeros if moved else differing
        return np.float64(xx), np.float64(ee), np.float64(xe), changed

    return of_halves if number < 0 else of_bytes


@functools.cache
def code_sums(kind: str) -> Callable[..., None]:
    """As `kernels.run_sums`, of rows of codes with scales.

    ``a`` and ``b`` are codes, uint8 ``[n * length]``. ``width`` neighbouring bytes share one of ``scales``,
    float64 ``[2, n, groups]``; of two codes each, they are a multiple of `PAIRS`. ``numbers`` and ``fields``
    as `tables` gives them.
    """
    number = _KINDS[kind]
    halves = number < 0
    near = 0.5 ** (CODE_BITS[kind] + 1)  # different codes of one sign are further apart than twice that

    @compiled(fastmath=FASTMATH)
    def kernel(
        a: Any, b: Any, width: int, scales: Any, numbers: Any, fields: Any, sums: Any, changed: Any
    ) -> None:
        length = a.size // changed.size
        for row in range(changed.size):
            aa, dd, ad, differing = 0.0, 0.0, 0.0, 0
            for group in range(scales.shape[2]):
                s, t = scales[0, row, group], scales[1, row, group]
                start = row * length + group * width
                stop = min(start + width, (row + 1) * length)
                moved = t - s
                if s != 0.0 and abs(moved) <= near * abs(t):
                    xx, ee, xe, count = _code_sums(number, a, b, start, stop, moved != 0.0, fields)
                    aa += s * s * xx
                    dd += t * t * ee + moved * (2.0 * t * xe + moved * xx)
                    ad += s * (t * xe + moved * xx)
                    differing += count
                else:
                    for half in range(1 + halves):
                        for i in range(u64(start), u64(stop)):
                            x = numbers[u64(u64(a[i]) << u64(halves)) | u64(half)] * s
                            y = numbers[u64(u64(b[i]) << u64(halves)) | u64(half)] * t
                            aa += x * x
                            dd += (y - x) * (y - x)
                            ad += x * (y - x)
                            differing += _bits(x) != _bits(y)
            sums[0, row], sums[1, row], sums[2, row], changed[row] = aa, dd, ad, differing

    return kernel


@functools.cache
def tables(kind: str) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
    """The numbers of each byte, whole ones; and of two codes a byte, the fields of each pair of bytes."""
    numbers, per_byte = code_table(kind)
    if per_byte == 1:
        return numbers, np.zeros(1, np.uint64)
    numbers = numbers * (2 if kind == "E2M1" else 1)
    every = np.arange(256)
    codes = np.stack([every & 15, every >> 4], axis=1)
    x, y = (numbers.astype(np.int64).reshape(256, 2)[place] for place in np.ix_(every, every))
    same = codes[:, None] == codes[None]
    parts = (x * x, (y - x) ** 2 << _EE, x * (y - x) << _XE, ~same << _DIFFERING, (same & (x == 0)) << _ZEROS)
    fields = sum((part.sum(axis=2) for part in parts), np.int64(_OFFSET << _XE))
    return numbers, np.asarray(fields, np.uint64).reshape(-1)


def sums_of_codes(
    codes: tuple[CodedWeight, CodedWeight],
    rows: Int64Array,
    a: RawBytes,
    b: RawBytes,
    sums: Float64Array,
    changed: Int64Array,
) -> None:
    """Fill ``sums`` and ``changed``, as `kernels.run_sums`, of ``rows`` whose codes are ``a`` and ``b``."""
    weight = codes[0].weight
    scales = np.stack([one.weight.scale_rows(one.files, rows) for one in codes])
    if weight.kind == "E2M1":
        scales *= 0.5
    width = weight.columns // code_table(weight.kind)[1]
    code_sums(weight.kind)(a, b, width, scales, *tables(weight.kind), sums, changed)


def prepare_codes(kind: str) -> None:
    """Compile, or load from the cache on disk, the kernel for this kind of codes."""
    a, sums, changed = np.zeros(PAIRS, np.uint8), np.zeros((3, 1)), np.zeros(1, np.int64)
    code_sums(kind)(a, a, PAIRS, np.ones((2, 1, 1)), *tables(kind), sums, changed)
