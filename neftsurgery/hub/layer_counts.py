"""Where a patch's neurons lie, as a card tells it: rows and columns that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..patch.patch import Patch
from ..reporting.layer_map import LayerMap

__all__ = ["Places", "places_of"]

#: More of either make no table that a person reads: neighbours are put together, rare kinds too.
_MOST_LAYERS = 40
_MOST_KINDS = 8


@dataclass(frozen=True)
class Places:
    """A patch's neurons by layer and kind; bias elements that follow a neuron are left out.

    Attributes
    ----------
    kinds:
        Kinds of weight, those with most neurons first; ``None`` stands for all further ones.
    layers:
        Names of layers in the model's order, ``"model.layers.3"``; ``""`` for what is in none. One name,
        or the first and last of neighbours that were put together.
    counts:
        Neurons per layer and kind.
    """

    kinds: Sequence[str | None]
    layers: Sequence[tuple[str, str]]
    counts: Sequence[Sequence[int]]

    @property
    def totals(self) -> list[int]:
        """Neurons per layer."""
        return [sum(row) for row in self.counts]


def places_of(patch: Patch) -> Places:
    """Count a patch's neurons. Layers and kinds are told from the tensors' names alone."""
    found = LayerMap.of_patch(patch)
    held = np.flatnonzero(found.chosen.sum(axis=1))
    layers = [found.layers[row] for row in held]
    kinds, counts = _columns(found, found.chosen[held])
    groups = list(_together(layers, counts))
    return Places(kinds, [(first, last) for first, last, _ in groups], [row for *_, row in groups])


def _columns(found: LayerMap, counts: NDArray[np.int64]) -> tuple[list[str | None], NDArray[np.int64]]:
    """The kinds with most neurons, and the counts of each and of all the others."""
    totals = counts.sum(axis=0)
    order = sorted(np.flatnonzero(totals), key=lambda kind: (-totals[kind], found.kinds[kind]))
    if len(order) <= _MOST_KINDS:
        return [found.kinds[kind] for kind in order], counts[:, order]
    order, others = order[: _MOST_KINDS - 1], order[_MOST_KINDS - 1 :]
    kept = np.column_stack([counts[:, order], counts[:, others].sum(axis=1)])
    return [*(found.kinds[kind] for kind in order), None], kept


def _together(layers: Sequence[str], counts: NDArray[np.int64]) -> Iterator[tuple[str, str, list[int]]]:
    """Neighbours of one stack as one row, so many that no more than `_MOST_LAYERS` or so are left."""
    size = -(-len(layers) // _MOST_LAYERS)
    start = 0
    while start < len(layers):
        stack = layers[start].rpartition(".")[0]
        stop = start + 1
        while stop < min(start + size, len(layers)) and layers[stop].rpartition(".")[0] == stack:
            stop += 1
        yield layers[start], layers[stop - 1], counts[start:stop].sum(axis=0).tolist()
        start = stop
