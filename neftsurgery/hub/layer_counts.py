"""A patch's neurons counted by layer and kind of weight, in a table short enough to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..patch.patch import Patch
from ..reporting.layer_map import LayerMap

__all__ = ["LayerCounts"]

#: A larger table is not read: neighbouring layers are put together, and so are rare kinds.
_MAX_LAYERS = 40
_MAX_KINDS = 8


@dataclass(frozen=True)
class LayerCounts:
    """A patch's neurons by layer and kind of weight, without the bias elements that go with a neuron."""

    #: Kinds of weight, the one with most neurons first; ``None`` stands for all remaining kinds.
    kinds: Sequence[str | None]
    #: The first and the last layer of each row, in the model's order, such as ``"model.layers.3"``. They are
    #: equal if the row is one layer; ``""`` stands for tensors outside the layers.
    layers: Sequence[tuple[str, str]]
    counts: Sequence[Sequence[int]]  # neurons per layer and kind

    @classmethod
    def of_patch(cls, patch: Patch) -> LayerCounts:
        """Count a patch's neurons. The names of the tensors alone say which layer and kind they belong to."""
        found = LayerMap.of_patch(patch)
        used = np.flatnonzero(found.chosen.sum(axis=1))
        layers = [found.layers[row] for row in used]
        kinds, counts = _columns(found, found.chosen[used])
        rows = list(_rows(layers, counts))
        return cls(kinds, [(first, last) for first, last, _ in rows], [row for *_, row in rows])

    @property
    def totals(self) -> list[int]:
        """Neurons per layer."""
        return [sum(row) for row in self.counts]


def _columns(found: LayerMap, counts: NDArray[np.int64]) -> tuple[list[str | None], NDArray[np.int64]]:
    """The kinds with most neurons, and the counts of each and of all the others."""
    totals = counts.sum(axis=0)
    order = sorted(np.flatnonzero(totals), key=lambda kind: (-totals[kind], found.kinds[kind]))
    if len(order) <= _MAX_KINDS:
        return [found.kinds[kind] for kind in order], counts[:, order]
    order, others = order[: _MAX_KINDS - 1], order[_MAX_KINDS - 1 :]
    kept = np.column_stack([counts[:, order], counts[:, others].sum(axis=1)])
    return [*(found.kinds[kind] for kind in order), None], kept


def _rows(layers: Sequence[str], counts: NDArray[np.int64]) -> Iterator[tuple[str, str, list[int]]]:
    """First layer, last layer and counts of each row: `_MAX_LAYERS` rows, and one more per stack of layers.

    Layers that share a row are neighbours in the same stack.
    """
    size = -(-len(layers) // _MAX_LAYERS)
    start = 0
    while start < len(layers):
        stack = layers[start].rpartition(".")[0]
        stop = start + 1
        while stop < min(start + size, len(layers)) and layers[stop].rpartition(".")[0] == stack:
            stop += 1
        yield layers[start], layers[stop - 1], counts[start:stop].sum(axis=0).tolist()
        start = stop
