"""The element types of the safetensors format: the one table of them, from which all others derive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["float", "integer", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """The meaning of a float's bits: a sign, an exponent, a fraction, from high to low."""

    fraction_bits: int
    bias: int  # what the stored exponent exceeds the true one by
    # The first magnitude (the bits without the sign) that is not a finite number. The FNUZ types have none
    # there: their only NaN is the pattern of negative zero, and this is the sign bit.
    nonfinite: int
    infinity: bool  # whether `nonfinite` is an infinity, not a NaN


@dataclass(frozen=True, slots=True)
class DType:
    """One element type."""

    name: str  # as safetensors writes it: ``BF16``
    bits: int  # of an element; below 8, several elements share a byte
    # Only ``float`` is scored. ``packed`` elements are codes whose value needs a scale stored elsewhere, or
    # that do not fill whole bytes.
    kind: Kind
    native: np.dtype[Any] | None = None  # the same type in numpy, little-endian
    format: FloatFormat | None = None  # of the kind ``float``

    @property
    def numpy(self) -> np.dtype[Any]:
        """`native`, for types that numpy has."""
        if self.native is None:
            raise ValueError(f"numpy has no type for {self.name}")
        return self.native

    @property
    def itemsize(self) -> int:
        """Bytes of an element; only for types of whole bytes."""
        if self.bits % 8:
            raise ValueError(f"{self.name} elements do not fill whole bytes")
        return self.bits // 8

    @property
    def carrier(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer type of the same size, which carries the bits unchanged."""
        return np.dtype(f"u{self.itemsize}")

    def nbytes(self, elements: int) -> int:
        """Bytes of ``elements`` elements."""
        return (elements * self.bits + 7) // 8


def _native(name: str, kind: Kind, native: str, format: FloatFormat | None = None) -> DType:
    return DType(name, 8 * np.dtype(native).itemsize, kind, np.dtype(native), format)


_TABLE = (
    _native("BOOL", "bool", "?"),
    DType("F4", 4, "packed"),
    DType("F6_E2M3", 6, "packed"),
    DType("F6_E3M2", 6, "packed"),
    _native("U8", "integer", "u1"),
    _native("I8", "integer", "i1"),
    DType("F8_E5M2", 8, "float", None, FloatFormat(2, 15, 0x7C, True)),
    DType("F8_E4M3", 8, "float", None, FloatFormat(3, 7, 0x7F, False)),
    DType("F8_E8M0", 8, "packed"),
    DType("F8_E4M3FNUZ", 8, "float", None, FloatFormat(3, 8, 0x80, False)),
    DType("F8_E5M2FNUZ", 8, "float", None, FloatFormat(2, 16, 0x80, False)),
    _native("I16", "integer", "<i2"),
    _native("U16", "integer", "<u2"),
    _native("F16", "float", "<f2", FloatFormat(10, 15, 0x7C00, True)),
    DType("BF16", 16, "float", None, FloatFormat(7, 127, 0x7F80, True)),
    _native("I32", "integer", "<i4"),
    _native("U32", "integer", "<u4"),
    _native("F32", "float", "<f4", FloatFormat(23, 127, 0x7F800000, True)),
    _native("C64", "complex", "<c8"),
    _native("F64", "float", "<f8", FloatFormat(52, 1023, 0x7FF0000000000000, True)),
    _native("I64", "integer", "<i8"),
    _native("U64", "integer", "<u8"),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}
