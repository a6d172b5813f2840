"""Codes of quantized weights to the numbers they stand for before any scale: raw bytes in, numbers out."""

from __future__ import annotations

import functools

import numpy as np

from ..tensors.arrays import Float32Array, Float64Array, RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.floats import FLOATS, widen

#: What codes may be: an 8-bit dtype of safetensors; ``E2M1``; integers stored with an offset, so that the
#: lowest is 0. And how many bits the fraction of such a number has, with its leading one.
CODE_BITS = {"F8_E4M3": 4, "F8_E5M2": 3, "E2M1": 2, "I8": 8, "offset 8": 8, "offset 4": 4}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)


@functools.cache
def code_table(kind: str) -> tuple[Float32Array, int]:
    """The numbers that bytes of codes stand for, one byte's behind the other's; and how many each has.

    Of codes of four bits, the low one comes first.
    """
    every = np.arange(256)
    if kind in ("E2M1", "offset 4"):
        halves = _E2M1 if kind == "E2M1" else np.arange(-8, 8, dtype=np.float32)
        return np.stack([halves[every & 15], halves[every >> 4]], axis=1).reshape(-1), 2
    if kind in ("I8", "offset 8"):
        return (every - 128 if kind == "offset 8" else every - 256 * (every > 127)).astype(np.float32), 1
    return widen(every.astype(np.uint8), kind).astype(np.float32), 1


def scales_decoded(raw: RawBytes, dtype: str) -> Float64Array:
    """The values of scales: floats, or bytes of E8M0, ``2 ** (code - 127)`` where 255 is NaN."""
    if dtype in FLOATS:
        return widen(raw, dtype)
    if dtype in ("U8", "F8E8M0"):
        return E8M0.take(raw)
    return np.ascontiguousarray(raw).view(DTYPES[dtype].numpy).astype(np.float64)
