"""Where rows lie in a patch file of version 2: few entries, which all tensors share.

There is an entry of all indices, one of all digests, and for each dtype one of new values and one of replaced
ones. Tensors lie in them one behind the other, in the order of their names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..neurons.layout import Layout
from ..tensors.header import TensorInfo

__all__ = ["RowPlaces", "SharedEntries"]


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where the rows of one tensor begin in the shared entries, along their first axes."""

    dtype: str
    width: int
    row: int  # in `index` and `base_digest`
    value: int  # in `value:DTYPE` and `base:DTYPE`, counted in elements
    base: int

    def of(self, part: str) -> tuple[str, int, int]:
        """The entry that holds a part, the first row's place in it, and the steps from row to row."""
        if part in ("index", "base_digest"):
            return part, self.row, 1
        return f"{part}:{self.dtype}", self.value if part == "value" else self.base, self.width


class SharedEntries:
    """Places the rows of tensors, which are added in the order of their names."""

    def __init__(self) -> None:
        self._filled = Counter({"index": 0, "base_digest": 0})

    def add(self, info: TensorInfo, layout: Layout, count: int, reversible: bool) -> RowPlaces:
        """Make room for ``count`` rows of a tensor."""
        filled = self._filled
        value, base = f"value:{info.dtype}", f"base:{info.dtype}"
        places = RowPlaces(info.dtype, layout.width, filled["index"], filled[value], filled[base])
        filled["index"] += count
        filled["base_digest"] += count
        filled[value] += count * layout.width
        if reversible:
            filled[base] += count * layout.width
        return places

    def entries(self, index_dtype: str) -> list[TensorInfo]:
        """The entries that hold all that was added."""
        dtypes = {"index": index_dtype, "base_digest": "U8"}
        return [
            TensorInfo(
                name,
                dtypes.get(name) or name.partition(":")[2],
                (count, 16) if name == "base_digest" else (count,),
            )
            for name, count in self._filled.items()
        ]
