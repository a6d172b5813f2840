"""How much of a checkpoint a fine-tune changes, and the least bytes that say how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Elements = NDArray[np.unsignedinteger[Any]]
EXPONENTS = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8)}  # their lowest bit, and how many bits


def information(base: Path, tuned: Path) -> dict[str, float]:
    """The entropy of the differences in bytes, and the share of elements and of bytes that change.

    A difference is that of the integers that order as the numbers do. Its probability depends on the kind of
    tensor (its name without layer numbers) and on the exponent of the base's element.
    """
    from neftsurgery.tensors.reader import TensorFile

    counts = _Counts()
    with TensorFile.open(base) as first, TensorFile.open(tuned) as second:
        for name, info in second.tensors.items():
            kind = f"u{info.type.itemsize}"
            a, b = (side.array_bytes(name).reshape(-1).view(kind) for side in (first, second))
            counts.add(re.sub(r"\d+", "*", name), a, b, *EXPONENTS[info.dtype])
    return {
        "entropy": counts.entropy() / 8,
        "changed": counts.changed / counts.elements,
        "changed_bytes": counts.changed_bytes / counts.nbytes,
    }


class _Counts:
    """Differences by kind and exponent: how often each occurs."""

    def __init__(self) -> None:
        self.elements = self.changed = self.nbytes = self.changed_bytes = 0
        self._same: dict[tuple[str, int], int] = {}
        self._other: dict[str, list[NDArray[np.int64]]] = {}

    def add(self, kind: str, base: Elements, tuned: Elements, low: int, bits: int) -> None:
        moved = np.flatnonzero(base != tuned)
        self.elements, self.nbytes = self.elements + base.size, self.nbytes + base.nbytes
        self.changed += moved.size
        self.changed_bytes += int(np.count_nonzero((base[moved] ^ tuned[moved]).view(np.uint8)))
        exponents = (base >> low) & ((1 << bits) - 1)
        a, b = base[moved], tuned[moved]
        counted = np.bincount(exponents, minlength=1 << bits) - np.bincount(
            exponents[moved], minlength=1 << bits
        )
        for exponent in np.flatnonzero(counted):
            key = (kind, int(exponent))
            self._same[key] = self._same.get(key, 0) + int(counted[exponent])
        top = 8 * base.itemsize - 1
        differences = _ordered(b, top) - _ordered(a, top)
        # Both in one number: the exponent above, and a difference of up to 33 bits with its sign below.
        self._other.setdefault(kind, []).append((exponents[moved].astype(np.int64) << 40) + differences)

    def entropy(self) -> float:
        """In bits."""
        total = 0.0
        for kind, parts in self._other.items():
            keys, counts = np.unique(np.concatenate(parts), return_counts=True)
            exponents = (keys + (1 << 39)) >> 40
            same = {exponent: count for (one, exponent), count in self._same.items() if one == kind}
            for exponent in {*same, *exponents.tolist()}:
                found = counts[exponents == exponent]
                if exponent in same:
                    found = np.append(found, same[exponent])
                total -= float((found * np.log2(found / found.sum())).sum())
        return total


def _ordered(bits: Elements, top: int) -> NDArray[np.int64]:
    """Integers that order as the floating-point numbers with these bits do."""
    whole = bits.astype(np.int64)
    return np.where(whole >> top, (1 << (top + 1)) - 1 - whole, whole | (1 << top))
