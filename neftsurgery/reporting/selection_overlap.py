"""The overlap of several selections: of each pair of them, overall and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .. import text
from ..selection.selection import Selection
from ..tensors.arrays import Float64Array, Int64Array
from .figure import ReportFigure
from .layer_map import NO_LAYER, locate_tensors, sorted_layers
from .plotting import MplFigure, heatmap

_MAX_DRAWN = 12
_MAX_LAYERS = 96


class _PairOverlap(NamedTuple):
    """The overlap of two selections, in one layer or overall: a row of the tables."""

    first: str
    second: str
    first_neurons: int
    second_neurons: int
    shared: int  # neurons in both
    jaccard: float  # of the neurons in either; NaN if both are empty
    shared_share: float  # of the neurons of the smaller one; NaN if it is empty
    chance_share: float  # the same, expected if both chose as many neurons per tensor at random

    @classmethod
    def of(cls, names: tuple[str, str], counts: Float64Array) -> _PairOverlap:
        """``counts``: the neurons of each, those in both, and how many these would be by chance."""
        first, second, shared, chance = counts
        smaller = min(first, second)
        with np.errstate(invalid="ignore"):
            shares = np.array([shared, shared, chance]) / [first + second - shared, smaller, smaller]
        return cls(*names, int(first), int(second), int(shared), *shares.tolist())


class SelectionOverlap:
    """The pairwise overlaps of several selections. Bias elements that go with their neurons are left out."""

    def __init__(self, names: Sequence[str], selections: Sequence[Selection]) -> None:
        companions = frozenset[str]().union(*(selection.facts.companion_biases for selection in selections))
        every = sorted({name for selection in selections for name in selection.tensors} - companions)
        chosen = {name: [selection.tensors.get(name) for selection in selections] for name in every}
        layouts = {name: {one.layout for one in found if one is not None} for name, found in chosen.items()}
        #: Tensors whose shape or neuron axes differ between selections. They are not compared.
        self.unfit = tuple(name for name in every if len(layouts[name]) > 1)
        locations = locate_tensors(every)
        #: The layers in which any of them has neurons, in natural order.
        self.layers = sorted_layers(locations.values())
        self._names = names
        # The overlaps of each pair, by the numbers of its two selections: by layer, and overall.
        self._by_layer: dict[tuple[int, int], dict[str, _PairOverlap]] = {}
        self._pairs: dict[tuple[int, int], _PairOverlap] = {}
        none: Int64Array = np.empty(0, np.int64)
        for pair in combinations(range(len(selections)), 2):
            counts = {layer: np.zeros(4) for layer in self.layers}
            for name, (layout, *others) in layouts.items():
                if not others:
                    a, b = (none if (one := chosen[name][n]) is None else one.index for n in pair)
                    shared, chance = np.intersect1d(a, b, assume_unique=True), len(a) * len(b) / layout.count
                    counts[locations[name].layer] += len(a), len(b), len(shared), chance
            both = names[pair[0]], names[pair[1]]
            self._by_layer[pair] = {layer: _PairOverlap.of(both, one) for layer, one in counts.items()}
            self._pairs[pair] = _PairOverlap.of(both, np.zeros(4) + sum(counts.values()))

    def figure(self) -> ReportFigure:
        """The overall overlap of each pair."""
        best = max(self._pairs.values(), key=lambda one: np.nan_to_num(one.jaccard))
        unfit = f" Tensors left out because their shapes differ: {len(self.unfit):,}." if self.unfit else ""
        verdict = (
            f"{'Most similar: ' if len(self._pairs) > 1 else ''}{text.label(best.first)} and "
            f"{text.label(best.second)} share {text.commas(best.shared)} neurons: "
            f"{text.percent(best.shared_share)} of the smaller one (by chance: "
            f"{text.percent(best.chance_share)}).{unfit}"
        )
        return ReportFigure.of("overlap", "", self._pairs.values(), self._draw, verdict)

    def _draw(self, fig: MplFigure) -> None:
        shown = min(len(self._names), _MAX_DRAWN)
        cells = np.full((shown, shown), np.nan)
        for (a, b), found in self._pairs.items():
            if b < shown:
                cells[a, b] = cells[b, a] = found.jaccard
        np.fill_diagonal(cells, 1.0)
        names = [text.label(name, 30) for name in self._names[:shown]]
        heatmap(fig, cells, names, names, top=1.0)

    def layers_figure(self) -> ReportFigure:
        """The overlap of each pair in each layer."""
        rows = (
            (layer, *found)
            for overlaps in self._by_layer.values()
            for layer, found in overlaps.items()
            if found.first_neurons or found.second_neurons
        )
        return ReportFigure.of("overlap-by-layer", "", rows, self._draw_layers)

    def _draw_layers(self, fig: MplFigure) -> None:
        pairs = list(self._by_layer)[:_MAX_DRAWN]
        layers = self.layers[:_MAX_LAYERS]
        cells = np.array([[self._by_layer[pair][layer].shared_share for pair in pairs] for layer in layers])
        rows = [text.label(layer, 24) if layer != NO_LAYER else "elsewhere" for layer in layers]
        heatmap(fig, cells, rows, [f"{a + 1} and {b + 1}" for a, b in pairs], top=1.0)
