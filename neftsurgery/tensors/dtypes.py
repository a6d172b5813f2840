"""The element types of the safetensors format, numpy's missing ones included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["DTYPES", "DType", "dtype_named"]

Kind = Literal["float", "integer", "bool", "complex", "packed"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes
    ----------
    name:
        As safetensors writes it: ``"BF16"``.
    bits:
        Bits an element takes; below 8 several elements share a byte.
    kind:
        ``"float"`` can be scored. ``"packed"`` elements are codes whose value needs a scale that
        lives elsewhere, or that do not fill whole bytes.
    """

    name: str
    bits: int
    kind: Kind

    @property
    def itemsize(self) -> int:
        """Bytes an element takes; only for types of whole bytes."""
        if self.bits % 8:
            raise ValueError(f"{self.name} elements do not fill whole bytes")
        return self.bits // 8

    @property
    def carrier(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned integer type of the same size, which carries the bits unread."""
        return np.dtype(f"u{self.itemsize}")

    def nbytes(self, elements: int) -> int:
        """Bytes that ``elements`` elements take."""
        return (elements * self.bits + 7) // 8


_TABLE: tuple[tuple[str, int, Kind], ...] = (
    ("BOOL", 8, "bool"),
    ("F4", 4, "packed"),
    ("F6_E2M3", 6, "packed"),
    ("F6_E3M2", 6, "packed"),
    ("U8", 8, "integer"),
    ("I8", 8, "integer"),
    ("F8_E5M2", 8, "float"),
    ("F8_E4M3", 8, "float"),
    ("F8_E8M0", 8, "packed"),
    ("F8_E4M3FNUZ", 8, "float"),
    ("F8_E5M2FNUZ", 8, "float"),
    ("I16", 16, "integer"),
    ("U16", 16, "integer"),
    ("F16", 16, "float"),
    ("BF16", 16, "float"),
    ("I32", 32, "integer"),
    ("U32", 32, "integer"),
    ("F32", 32, "float"),
    ("C64", 64, "complex"),
    ("F64", 64, "float"),
    ("I64", 64, "integer"),
    ("U64", 64, "integer"),
)

DTYPES: dict[str, DType] = {name: DType(name, bits, kind) for name, bits, kind in _TABLE}


def dtype_named(name: str) -> DType:
    """The type safetensors calls ``name``.

    Raises
    ------
    KeyError
        For a name the format does not know.
    """
    return DTYPES[name]
