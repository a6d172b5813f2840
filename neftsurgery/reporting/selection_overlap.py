"""The overlap of several selections: of each pair of them, overall and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from operator import add

import numpy as np

from .. import text
from ..selection.selection import Selection
from ..tensors.arrays import Int64Array
from .figure import LAYER, Cell, Column, ReportFigure, Table
from .layer_map import NO_LAYER, locate_tensors, sorted_layers
from .plotting import MplFigure, heatmap

_MAX_DRAWN = 12
_MAX_LAYERS = 96


@dataclass(frozen=True, slots=True)
class _PairOverlap:
    """The overlap of two selections, in one layer or overall."""

    first: int = 0  # how many neurons the first has
    second: int = 0
    shared: int = 0  # how many neurons are in both
    chance: float = 0.0  # the expected number if both chose as many neurons per tensor at random

    def __add__(self, other: _PairOverlap) -> _PairOverlap:
        return _PairOverlap(*map(add, astuple(self), astuple(other)))

    @property
    def jaccard(self) -> float:
        """Neurons in both over neurons in either; NaN if both are empty."""
        return _share(self.shared, self.first + self.second - self.shared)

    @property
    def shared_share(self) -> float:
        """Neurons in both over the neurons of the smaller one; NaN if one is empty."""
        return _share(self.shared, min(self.first, self.second))

    @property
    def chance_share(self) -> float:
        """The expected `shared_share` of a random choice."""
        return _share(self.chance, min(self.first, self.second))


def _share(count: float, whole: int) -> float:
    return count / whole if whole else np.nan


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
        # The overlap of each pair in each layer, by the numbers of its two selections.
        self._by_layer: dict[tuple[int, int], dict[str, _PairOverlap]] = {}
        none: Int64Array = np.empty(0, np.int64)
        for pair in combinations(range(len(selections)), 2):
            found = self._by_layer[pair] = dict.fromkeys(self.layers, _PairOverlap())
            for name, (layout, *others) in layouts.items():
                if not others:
                    a, b = (none if (one := chosen[name][n]) is None else one.index for n in pair)
                    shared = len(np.intersect1d(a, b, assume_unique=True))
                    pair_overlap = _PairOverlap(len(a), len(b), shared, len(a) * len(b) / layout.count)
                    found[locations[name].layer] += pair_overlap
        self._pairs = {pair: sum(by.values(), _PairOverlap()) for pair, by in self._by_layer.items()}

    def figure(self) -> ReportFigure:
        """The overall overlap of each pair."""
        rows = tuple(self._row(pair, found) for pair, found in self._pairs.items())
        best = max(self._pairs, key=lambda pair: np.nan_to_num(self._pairs[pair].jaccard))
        found = self._pairs[best]
        a, b = (text.label(self._names[n]) for n in best)
        unfit = f" Tensors left out because their shapes differ: {len(self.unfit):,}." if self.unfit else ""
        return ReportFigure(
            "overlap",
            "Overlap",
            "Jaccard index: neurons in both over neurons in either, in percent",
            "Each cell compares two choices: 100 if they are the same, 0 if they share no neuron. The column "
            "“by chance” is the expected overlap of random choices with as many neurons per tensor.",
            Table(_columns("jaccard"), rows),
            self._draw,
            f"{'Most similar: ' if len(self._pairs) > 1 else ''}{a} and {b} share "
            f"{text.commas(found.shared)} neurons: {text.percent(found.shared_share)} of the smaller one (by "
            f"chance: {text.percent(found.chance_share)}).{unfit}",
        )

    def _row(self, pair: tuple[int, int], found: _PairOverlap) -> tuple[Cell, ...]:
        """A pair as a table row with the columns of `_columns`."""
        first, second = (self._names[number] for number in pair)
        counts = found.first, found.second, found.shared
        return (first, second, *counts, found.jaccard, found.shared_share, found.chance_share)

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
        rows = tuple(
            (layer, *self._row(pair, found))
            for pair, overlaps in self._by_layer.items()
            for layer, found in overlaps.items()
            if found.first or found.second
        )
        return ReportFigure(
            "overlap-by-layer",
            "Overlap by layer",
            "neurons in both, percent of the smaller choice in that layer",
            "Each row is a layer, each column a pair of choices, numbered in the order of this report. An "
            "empty cell means that one of the two has no neuron in that layer.",
            Table((LAYER, *_columns("shared_share")), rows),
            self._draw_layers,
        )

    def _draw_layers(self, fig: MplFigure) -> None:
        pairs = list(self._by_layer)[:_MAX_DRAWN]
        layers = self.layers[:_MAX_LAYERS]
        cells = np.array([[self._by_layer[pair][layer].shared_share for pair in pairs] for layer in layers])
        rows = [text.label(layer, 24) if layer != NO_LAYER else "elsewhere" for layer in layers]
        heatmap(fig, cells, rows, [f"{a + 1} and {b + 1}" for a, b in pairs], top=1.0)


def _columns(drawn: str) -> tuple[Column, ...]:
    """The columns of a pair's overlap. The column ``drawn``, which the figure shows, gets a bar."""
    columns = (
        ("first", "first", text.label),
        ("second", "second", text.label),
        ("first_neurons", "neurons", text.commas),
        ("second_neurons", "neurons", text.commas),
        ("shared", "in both", text.commas),
        ("jaccard", "Jaccard", text.percent),
        ("shared_share", "share of the smaller", text.percent),
        ("chance_share", "by chance", text.percent),
    )
    return tuple(Column(key, title, show, bar=key == drawn) for key, title, show in columns)
