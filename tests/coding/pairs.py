"""Elements before and after training, made for tests: any dtype, any share of changes, odd values."""

from __future__ import annotations

import numpy as np

from coding.reference import FLOATS, WIDTHS
from neftsurgery.coding.elements import Carrier


def odd(dtype: str) -> list[int]:
    """Bits that are easily lost: zeros, infinities, NaNs with a payload, denormals, the ends of integers."""
    width = WIDTHS[dtype]
    top = 1 << (width - 1)
    found = {0, 1, top - 1, top, top + 1, 2 * top - 1}
    if dtype in FLOATS:
        exponent, fraction = FLOATS[dtype]
        infinity = ((1 << exponent) - 1) << fraction
        found |= {infinity, infinity | 1, top | infinity, top | infinity | 3, (1 << fraction) - 1}
    return sorted(number % (2 * top) for number in found)


def weights(dtype: str, length: int, rng: np.random.Generator) -> Carrier:
    """Bits as weights have them: normal where that is a type of floats, else random."""
    carrier = np.dtype(f"u{WIDTHS[dtype] // 8}")
    values = 0.02 * rng.standard_normal(length)
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(carrier)
    if dtype in ("F16", "F32", "F64"):
        return values.astype(f"f{carrier.itemsize}").view(carrier)
    return rng.integers(0, 256, (length, carrier.itemsize), np.uint8).view(carrier).reshape(-1)


def changed(dtype: str, base: Carrier, share: float, kind: str, rng: np.random.Generator) -> Carrier:
    """A ``share`` of the elements changed: by ``steps`` of their bits, to ``odd`` values, to ``noise``."""
    new = {
        "steps": base + rng.integers(1, 4, len(base)).astype(base.dtype),
        "noise": rng.integers(0, 256, (len(base), base.itemsize), np.uint8).view(base.dtype).reshape(-1),
        "odd": np.array(odd(dtype), base.dtype)[rng.integers(0, len(odd(dtype)), len(base))],
    }[kind]
    return np.where(rng.random(len(base)) < share, new, base)


def conditional_entropy(dtype: str, base: Carrier, tuned: Carrier) -> float:
    """Bytes that no code beats which knows how often each difference comes with each exponent of the base."""
    exponents = (base >> np.uint64(FLOATS[dtype][1])).astype(np.int64) & 0xFF
    top = np.int64(1) << (8 * base.itemsize - 1)

    def place(bits: Carrier) -> np.ndarray:
        wide = bits.astype(np.int64)
        return np.where(wide & top, 2 * top - 1 - wide, wide + top)

    pairs = (exponents << 40) + place(tuned) - place(base)
    _, joint = np.unique(pairs, return_counts=True)
    _, alone = np.unique(exponents, return_counts=True)
    return float((np.log2(alone) * alone).sum() - (np.log2(joint) * joint).sum()) / 8
