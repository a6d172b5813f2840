"""Elements as unsigned integers: their bits, the order of their values, and what predicts a change."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..tensors.dtypes import DTYPES

#: Elements of a block at most.
BLOCK = 1 << 20
#: Frequencies of a context sum to two to this power.
PRECISION = 12
#: Fine classes tell numbers apart by this many of their highest bits.
FINE = 6
#: How many there are of numbers below 2^64. Classes from here on are of single numbers, by bits of a hash.
CLASSES, HASH = (64 - FINE + 2) << (FINE - 1), 9
#: A gap that leads out of every block: none follows.
NEVER = BLOCK

#: Elements decoded between two looks at the code's ends: each takes a word from its front, two from its back.
CHUNK = 1024

Carrier: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""Elements as the unsigned integers of their bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Elements:
    """How the elements of one dtype are compared. Made by `of`."""

    carrier: np.dtype[np.unsignedinteger[Any]]  # the integers that hold the bits of elements
    # For kernels: shift and mask of the context in a base element's bits, the highest bit, all bits, and what
    # is flipped to order negative and positive elements by value.
    rules: tuple[np.uint64, ...]

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.carrier.itemsize

    @staticmethod
    @functools.cache
    def of(dtype: str) -> Elements:
        """The elements of a safetensors dtype, bytes if they fill no whole ones; complex ones are pairs."""
        kind = DTYPES["F32" if dtype == "C64" else dtype]
        bits = kind.bits if kind.bits % 8 == 0 else 8
        top, full = 1 << (bits - 1), (1 << bits) - 1
        if kind.format is None:
            rules = [0, 0, top, full, 0, 0]
        else:
            exponent_bits = bits - 1 - kind.format.fraction_bits
            dropped = max(0, exponent_bits - 8)
            mask = (1 << (exponent_bits - dropped)) - 1
            rules = [kind.format.fraction_bits + dropped, mask, top, full, full, top]
        return Elements(np.dtype(f"u{bits // 8}"), tuple(np.uint64(rule) for rule in rules))


@functools.cache
def fine_classes(width: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Of each fine class of numbers of ``width`` bits: its least number, and how many plain bits follow."""
    octave = np.maximum(np.arange(max(0, width - FINE + 2) << (FINE - 1)) >> (FINE - 1), 1) - 1
    first = np.arange(len(octave)) - (octave << (FINE - 1))
    return first.astype(np.uint64) << octave.astype(np.uint64), octave.astype(np.uint64)
