"""Which entries of a patch file hold the rows of a tensor.

In version 2, all tensors share an entry of indices, one of digests, and for each dtype one of new and one of
replaced values: there they lie one behind the other, in the order of their names. In version 1, each has
entries of its own.
"""

from __future__ import annotations

from ..neurons.layout import Layout
from ..tensors.header import TensorInfo

#: By part (``index``, ``base_digest``, ``value``, ``base``): the entry that holds a tensor's rows, where they
#: begin along its first axis, and how many steps of that a row takes.
RowPlaces = dict[str, tuple[str, int, int]]


class PatchEntries:
    """The entries that hold all tensors that were added, in the order of their names."""

    def __init__(self, index_dtype: str, *, own: bool = False) -> None:
        self._own, self._index_dtype = own, index_dtype  # own: each tensor has entries of its own
        shared = (TensorInfo("index", index_dtype, (0,)), TensorInfo("base_digest", "U8", (0, 16)))
        self.infos = {} if own else {info.name: info for info in shared}

    def add(
        self, info: TensorInfo, layout: Layout, count: int, reversible: bool, index_dtype: str | None = None
    ) -> RowPlaces:
        """Place ``count`` rows of a tensor; ``index_dtype``: that of an index of its own."""
        values = (info.dtype, 1, (layout.width,)) if self._own else (info.dtype, layout.width, ())
        parts = {
            "index": (index_dtype or self._index_dtype, 1, ()),
            "base_digest": ("U8", 1, (16,)),
            "value": values,
        }
        places = RowPlaces()
        for part, (dtype, step, row) in (parts | ({"base": values} if reversible else {})).items():
            shared = f"{part}:{dtype}" if part in ("value", "base") else part
            entry = f"{info.name}:{part}" if self._own else shared
            first = self.infos[entry].shape[0] if entry in self.infos else 0
            self.infos[entry] = TensorInfo(entry, dtype, (first + count * step, *row))
            places[part] = entry, first, step
        return places
