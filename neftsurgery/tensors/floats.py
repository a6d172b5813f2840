"""Floats of the safetensors format to float64 and back, with the types that numpy lacks.

Narrowing rounds once, to nearest, ties to even: going through float32 would round twice.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Float64Array, RawBytes
from .dtypes import DTYPES

_FORMATS = {name: dtype.format for name, dtype in DTYPES.items() if dtype.format is not None}
#: The types that `widen` and `narrow` know, by safetensors' name.
FLOATS = frozenset(_FORMATS)


def widen(raw: RawBytes, dtype: str) -> Float64Array:
    """The values of raw elements, exactly: uint8 ``[..., k * itemsize]`` to float64 ``[..., k]``."""
    native = DTYPES[dtype].native
    bits = np.ascontiguousarray(raw).view(DTYPES[dtype].carrier)
    with np.errstate(invalid="ignore"):  # a signalling NaN is only a NaN
        if dtype == "BF16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        if native is not None:
            return bits.view(native).astype(np.float64)
    table: Float64Array = _values(dtype)[bits]
    return table


def narrow(values: NDArray[Any], dtype: str) -> RawBytes:
    """Raw elements nearest to ``values``: float ``[..., k]`` to uint8 ``[..., k * itemsize]``.

    Too large numbers become an infinity, or in types without one the largest number, and infinities NaN.
    """
    native = DTYPES[dtype].native
    wide = np.ascontiguousarray(values, np.float64)
    if dtype == "BF16":
        return _to_bfloat16(wide).view(np.uint8)
    if native is not None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.ascontiguousarray(wide.astype(native)).view(np.uint8)
    return _to_byte(wide, dtype)


def _to_bfloat16(values: Float64Array) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        back = near.astype(np.float64)
        # Rounded to odd first: toward zero, with the last bit set if anything was lost. Rounding that to
        # nearest gives what rounding once would.
        lost, beyond = back != values, np.abs(back) > np.abs(values)
    bits = near.view(np.uint32) - (lost & beyond).astype(np.uint32)
    bits |= lost
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (near.view(np.uint32) >> np.uint32(16)) | np.uint32(0x40)  # quiet, the sign kept
    return np.where(np.isnan(values), nan, rounded).astype(np.uint16)


def _to_byte(values: Float64Array, dtype: str) -> RawBytes:
    format = _FORMATS[dtype]
    special, magnitudes = format.nonfinite, _magnitudes(dtype)
    size = np.abs(values)
    codes = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, size)
    # A size midway between two codes was rounded down; from odd codes it must be rounded up.
    low, high = magnitudes[np.minimum(codes, special - 1)], magnitudes[np.minimum(codes + 1, special)]
    codes = codes + ((size == (low + high) / 2) & (codes % 2 == 1) & (codes < special))
    nan = np.isnan(values)
    if not format.infinity:
        nan |= np.isinf(values)
        codes = np.minimum(codes, special - 1)
    # The FNUZ types have no negative zero: its pattern is their one NaN.
    sign = np.signbit(values) & ((codes > 0) | (special != 0x80))
    bits = np.where(nan, 0x80 if special == 0x80 else 0x7F, codes | np.where(sign, 0x80, 0))
    return bits.astype(np.uint8)


@functools.cache
def _magnitudes(dtype: str) -> Float64Array:
    """The values of codes 0 to ``nonfinite``; the last as if the finite numbers went on."""
    format = _FORMATS[dtype]
    fraction_bits, bias = format.fraction_bits, format.bias
    codes = np.arange(format.nonfinite + 1)
    exponent, fraction = codes >> fraction_bits, codes & ((1 << fraction_bits) - 1)
    normal = np.ldexp(1.0 + fraction / (1 << fraction_bits), exponent - bias)
    subnormal = np.ldexp(fraction / (1 << fraction_bits), 1 - bias)
    return np.where(exponent == 0, subnormal, normal)


@functools.cache
def _values(dtype: str) -> Float64Array:
    """The values of all 256 codes."""
    format = _FORMATS[dtype]
    special = format.nonfinite
    half = np.full(128, np.nan)
    finite = _magnitudes(dtype)[: min(special, 128)]
    half[: len(finite)] = finite
    if format.infinity:
        half[special] = np.inf
    values = np.concatenate([half, -half])
    if special == 0x80:
        values[0x80] = np.nan
    return values
