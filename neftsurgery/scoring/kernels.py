"""The arithmetic of scoring: raw bits of two tensors in, sums per neuron out. Pure, compiled, no GIL.

Per neuron, of its vectors ``a`` in the base and ``b`` in the tuned checkpoint and ``d = b - a``: the
sums ``a.a``, ``d.d``, ``a.d`` and the number of elements whose bits differ. Everything a score needs
follows from them (`neftsurgery.scoring.sums`).

`run_sums` and `column_sums` are the fast kernels: elements are widened to float32 on the way in,
differences taken per element, and sums kept in float32 over short blocks and in float64 beyond.
That is exact enough unless ``d`` is nearly parallel to ``a``, a sum leaves float32's range, or an
element is not finite. `exact_sums` is for those vectors, and for all of F64.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ..tensors.compiled import compiled
from ..tensors.dtypes import DTYPES
from ..tensors.floats import FLOATS, widen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


#: Element types that can be scored, by safetensors' name, and the code by which the kernels know them.
FORMATS = {name: code for code, name in enumerate(sorted(FLOATS))}

# Sums may be reordered and contracted, or nothing vectorises. NaN and Inf must be kept, so neither "nnan"
# nor "ninf".
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
_BLOCK = 1024  # elements per float32 partial sum
_AHEAD = 1024  # bytes: how far ahead memory is prefetched
LINE = 64  # bytes, of memory
_TILE = 2048  # neurons per tile of column_sums: three float32 accumulators of it stay in L1
_COLUMN_BLOCK = 64  # runs per float32 partial sum

u16, u32, u64 = np.uint16, np.uint32, np.uint64


def bitcast(source: Any, target: Any) -> Any:
    """For compiled code: the bits of a value as one of another type of the same size."""

    @intrinsic
    def cast(typing_context: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    return cast


_as_float32 = bitcast(types.uint32, types.float32)
_as_float64 = bitcast(types.uint64, types.float64)


@intrinsic
def prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    """Prefetch the cache line of an element. An index out of range does no harm.

    The processor's own prefetcher stops at the end of each 4 KiB page, as the pages of a file may lie
    anywhere in memory.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte_pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        pointer = builder.bitcast(builder.gep(data, [args[1]]), byte_pointer)
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte_pointer], kind)
        builder.call(function, [pointer, word(0), word(3), word(1)])  # to read, keep near, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


# The signature of the overload below must equal those of its implementations, lambdas among them,
# so they carry no annotations.
def widened(code, bits):  # type: ignore[no-untyped-def]
    """The value of an element as float32 (float64 for F64). Compiled by the overload below."""
    raise TypeError("only for compiled code")


@intrinsic
def half(typing_context, bits):  # type: ignore[no-untyped-def]
    """The number that bits of float16 stand for, as float32: one instruction, for subnormal numbers too."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def _table_decoder(name: str) -> Any:
    """Of a type of one byte."""
    table = widen(np.arange(256, dtype=np.uint8), name).astype(np.float32)
    return lambda code, bits: table[bits]


_WIDE = {
    "F64": lambda code, bits: _as_float64(u64(bits)),
    "F32": lambda code, bits: _as_float32(u32(bits)),
    "BF16": lambda code, bits: _as_float32(u32(u32(bits) << u32(16))),
    "F16": lambda code, bits: half(u16(bits)),
}
_DECODERS = {code: _WIDE.get(name) or _table_decoder(name) for name, code in FORMATS.items()}


@overload(widened)
def _widen_overload(code, bits):  # type: ignore[no-untyped-def]
    return _DECODERS[code.literal_value] if isinstance(code, types.Literal) else None


@functools.cache
def run_sums(dtype: str) -> Callable[..., None]:
    """Sums of consecutive runs of ``length`` elements, each run of one neuron.

    ``a`` and ``b`` are raw elements of base and tuned, unsigned integers ``[n * length]``. Written are
    ``sums``, float64 ``[3, n]``: ``a.a``, ``d.d``, ``a.d``; and ``changed``, int64 ``[n]``: how many elements
    have other bits.
    """
    code = FORMATS[dtype]
    itemsize = DTYPES[dtype].itemsize
    ahead, line = _AHEAD // itemsize, LINE // itemsize

    @compiled(fastmath=FASTMATH)
    def kernel(a: Any, b: Any, length: int, sums: Any, changed: Any) -> None:
        for run in range(changed.size):
            aa, dd, ad, differing = 0.0, 0.0, 0.0, 0
            for start in range(run * length, (run + 1) * length, _BLOCK):
                # With slices the compiler sees that no index is negative, and vectorises.
                block_a = a[start : min(start + _BLOCK, (run + 1) * length)]
                block_b = b[start : min(start + _BLOCK, (run + 1) * length)]
                for soon in range(start + ahead, start + ahead + block_a.size, line):
                    prefetch(a, soon)
                    prefetch(b, soon)
                aa32, dd32, ad32, count = np.float32(0), np.float32(0), np.float32(0), u32(0)
                for i in range(block_a.size):
                    x = widened(code, block_a[i])
                    d = widened(code, block_b[i]) - x
                    aa32 += x * x
                    dd32 += d * d
                    ad32 += x * d
                    if block_a[i] != block_b[i]:
                        count = u32(count + u32(1))
                aa += aa32
                dd += dd32
                ad += ad32
                differing += count
            sums[0, run], sums[1, run], sums[2, run], changed[run] = aa, dd, ad, differing

    return kernel


@functools.cache
def column_sums(dtype: str) -> Callable[..., None]:
    """Sums of ``length`` neurons that lie side by side: element ``i`` of every run belongs to neuron ``i``.

    As `run_sums`, but ``a`` and ``b`` hold any number of runs, ``sums`` is ``[3, length]`` and
    ``changed`` ``[length]``, and both are added to.
    """
    code = FORMATS[dtype]
    partial = np.float64 if dtype == "F64" else np.float32
    line = LINE // DTYPES[dtype].itemsize

    @compiled(fastmath=FASTMATH)
    def kernel(a: Any, b: Any, length: int, sums: Any, changed: Any) -> None:
        runs = a.size // length
        aa = np.empty(_TILE, partial)
        dd = np.empty(_TILE, partial)
        ad = np.empty(_TILE, partial)
        count = np.empty(_TILE, np.uint32)
        for low in range(0, length, _TILE):
            columns = min(_TILE, length - low)
            for first in range(0, runs, _COLUMN_BLOCK):
                for i in range(columns):
                    aa[i], dd[i], ad[i], count[i] = 0, 0, 0, 0
                for run in range(first, min(first + _COLUMN_BLOCK, runs)):
                    row_a = a[run * length + low : run * length + low + columns]
                    row_b = b[run * length + low : run * length + low + columns]
                    for soon in range((run + 1) * length + low, (run + 1) * length + low + columns, line):
                        prefetch(a, soon)
                        prefetch(b, soon)
                    for i in range(row_a.size):
                        x = widened(code, row_a[i])
                        d = widened(code, row_b[i]) - x
                        aa[i] += x * x
                        dd[i] += d * d
                        ad[i] += x * d
                        if row_a[i] != row_b[i]:
                            count[i] = u32(count[i] + u32(1))
                for i in range(columns):
                    sums[0, low + i] += aa[i]
                    sums[1, low + i] += dd[i]
                    sums[2, low + i] += ad[i]
                    changed[low + i] += count[i]

    return kernel


@functools.cache
def exact_sums(dtype: str) -> Callable[..., None]:
    """Float64 sums of whole vectors, and the part of ``d`` that is not parallel to ``a``.

    ``a`` and ``b`` are raw elements, unsigned integers ``[n, width]``, of which the rows ``chosen``, int64
    ``[k]``, are summed. ``scale`` is a factor on all elements: a power of two, 1 unless squares would leave
    float64's range. Written are ``out``, float64 ``[7, k]``: ``a.a``, ``d.d``, ``a.d``, ``b.b``, ``a.b``,
    ``r.r`` where ``r = d - (a.d / a.a) a``, and the largest magnitude in ``a`` and ``b`` before scaling;
    ``changed``, int64 ``[k]``: how many elements have other bits; and ``finite``, bool ``[k]``: whether every
    element of both vectors is finite.
    """
    code = FORMATS[dtype]

    @compiled()
    def kernel(a: Any, b: Any, chosen: Any, scale: float, out: Any, changed: Any, finite: Any) -> None:
        for row in range(chosen.size):
            aa, dd, ad, bb, ab, top, differing, good = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, True
            row_a, row_b = a[chosen[row]], b[chosen[row]]
            bits = row_a[0] ^ row_a[0]
            for i in range(row_a.size):
                bits |= row_a[i] | row_b[i]
            if bits == 0:  # both sides are all zeros, as in pruned weights: nothing to sum
                out[:, row] = 0.0
                changed[row], finite[row] = 0, True
                continue
            for i in range(row_a.size):
                x = np.float64(widened(code, row_a[i]))
                y = np.float64(widened(code, row_b[i]))
                good = good and bool(abs(x) < np.inf) and bool(abs(y) < np.inf)
                top = max(top, max(abs(x), abs(y)))
                x *= scale
                y *= scale
                d = y - x
                aa += x * x
                dd += d * d
                ad += x * d
                bb += y * y
                ab += x * y
                if row_a[i] != row_b[i]:
                    differing += 1
            # r is also b - (a.b / a.a) a, which is exact where b is so small beside a that d loses it.
            small = bb < dd
            along = (ab if small else ad) / aa if aa > 0.0 else 0.0
            rr = 0.0
            for i in range(row_a.size):
                x = np.float64(widened(code, row_a[i])) * scale
                y = np.float64(widened(code, row_b[i])) * scale
                r = (y if small else y - x) - along * x
                rr += r * r
            out[0, row], out[1, row], out[2, row], out[3, row] = aa, dd, ad, bb
            out[4, row], out[5, row], out[6, row] = ab, rr, top
            changed[row], finite[row] = differing, good

    return kernel


def prepare(dtypes: Iterable[str]) -> None:
    """Compile, or load from the cache on disk, the kernels for these element types."""
    for dtype in sorted(set(dtypes) & set(FORMATS)):
        a = np.zeros((1, 2), DTYPES[dtype].carrier)
        sums, changed = np.zeros((3, 2)), np.zeros(2, np.int64)
        run_sums(dtype)(a[0], a[0], 1, sums, changed)
        column_sums(dtype)(a[0], a[0], 2, sums, changed)
        exact_sums(dtype)(a, a, changed[:1], 1.0, np.zeros((7, 1)), changed[:1], np.zeros(1, np.bool_))
