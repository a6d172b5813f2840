"""The overlap of several selections: of each pair of them, overall and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import text
from ..selection.selection import Chosen, Selection
from .figure import Column, ReportFigure, Table
from .layer_map import NO_LAYER, locate_tensors, sorted_layers
from .plotting import MplFigure, heatmap, new_axes

__all__ = ["PairOverlap", "SelectionOverlap"]

_MAX_DRAWN = 12
_MAX_LAYERS = 96


@dataclass(frozen=True, slots=True)
class PairOverlap:
    """The overlap of two selections, in one layer or overall."""

    # How many neurons each of them has.
    first: int
    second: int
    shared: int  # how many neurons are in both
    chance: float  # the expected number of shared neurons if both chose as many neurons per tensor at random

    def __add__(self, other: PairOverlap) -> PairOverlap:
        return PairOverlap(*map(add, astuple(self), astuple(other)))

    @property
    def jaccard(self) -> float:
        """Neurons in both over neurons in either; NaN if both are empty."""
        either = self.first + self.second - self.shared
        return self.shared / either if either else np.nan

    @property
    def shared_share(self) -> float:
        """Neurons in both over the neurons of the smaller one; NaN if one is empty."""
        smaller = min(self.first, self.second)
        return self.shared / smaller if smaller else np.nan

    @property
    def chance_share(self) -> float:
        """The expected `shared_share` of a random choice."""
        smaller = min(self.first, self.second)
        return self.chance / smaller if smaller else np.nan


@dataclass(frozen=True, eq=False)
class SelectionOverlap:
    """The pairwise overlaps of several selections."""

    names: tuple[str, ...]  # the names of the selections
    # The overlap of each pair, by the numbers of its two selections.
    pairs: dict[tuple[int, int], PairOverlap]
    layers: tuple[str, ...]  # the layers in which any of them has neurons, in natural order
    by_layer: dict[tuple[int, int], tuple[PairOverlap, ...]]  # the overlap of each pair in each layer
    # Tensors whose shape or neuron axes differ between selections. They are not compared.
    unfit: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], selections: Sequence[Selection]) -> SelectionOverlap:
        """Compare selections. Bias elements that go with their neurons are left out."""
        companions = frozenset[str]().union(*(selection.facts.companion_biases for selection in selections))
        every = sorted({name for selection in selections for name in selection.tensors} - companions)
        locations = locate_tensors(every)
        shapes = {
            name: {
                (chosen.info.shape, chosen.layout.axes)
                for selection in selections
                if (chosen := selection.tensors.get(name)) is not None
            }
            for name in every
        }
        unfit = {name: None for name in every if len(shapes[name]) > 1}
        layers = sorted_layers(locations.values())
        pairs: dict[tuple[int, int], PairOverlap] = {}
        by_layer: dict[tuple[int, int], tuple[PairOverlap, ...]] = {}
        for pair in combinations(range(len(selections)), 2):
            found = {layer: PairOverlap(0, 0, 0, 0.0) for layer in layers}
            for name in every:
                if name not in unfit:
                    found[locations[name].layer] += _tensor_overlap(
                        [selections[n].tensors.get(name) for n in pair]
                    )
            by_layer[pair] = tuple(found.values())
            pairs[pair] = sum(found.values(), PairOverlap(0, 0, 0, 0.0))
        return cls(tuple(names), pairs, tuple(layers), by_layer, tuple(unfit))

    @property
    def verdict(self) -> str:
        """A sentence on the most similar pair."""
        best = max(self.pairs, key=lambda pair: np.nan_to_num(self.pairs[pair].jaccard))
        found = self.pairs[best]
        a, b = (text.label(self.names[n]) for n in best)
        verdict = (
            f"{a} and {b} share {text.commas(found.shared)} neurons: {text.percent(found.shared_share)} of "
            f"the smaller one (by chance: {text.percent(found.chance_share)})."
        )
        if len(self.pairs) > 1:
            verdict = f"Most similar: {verdict}"
        if self.unfit:
            verdict += f" Tensors left out because their shapes differ: {len(self.unfit):,}."
        return verdict

    def figure(self) -> ReportFigure:
        """The overall overlap of each pair."""
        rows = tuple(self._row(pair, found) for pair, found in self.pairs.items())
        return ReportFigure(
            "overlap",
            "Overlap",
            "Jaccard index: neurons in both over neurons in either, in percent",
            "Each cell compares two choices: 100 if they are the same, 0 if they share no neuron. The column "
            "“by chance” is the expected overlap of random choices with as many neurons per tensor.",
            Table(_columns("jaccard"), rows),
            self._draw,
            self.verdict,
        )

    def _row(self, pair: tuple[int, int], found: PairOverlap) -> tuple[Any, ...]:
        """A pair as a table row with the columns of `_columns`."""
        first, second = (self.names[number] for number in pair)
        counts = found.first, found.second, found.shared
        return (first, second, *counts, found.jaccard, found.shared_share, found.chance_share)

    def _draw(self, fig: MplFigure) -> None:
        shown = min(len(self.names), _MAX_DRAWN)
        cells = np.full((shown, shown), np.nan)
        for (a, b), found in self.pairs.items():
            if b < shown:
                cells[a, b] = cells[b, a] = found.jaccard
        np.fill_diagonal(cells, 1.0)
        names = [text.label(name, 30) for name in self.names[:shown]]
        slanted = 0.042 * max(len(name) for name in names)
        axes = new_axes(fig, 0.4 + slanted + max(0.32 * shown, 0.7))
        heatmap(axes, cells, names, names, top=1.0)

    def layers_figure(self) -> ReportFigure:
        """The overlap of each pair in each layer."""
        columns = (Column("layer", "layer", text.label), *_columns("shared_share"))
        rows = tuple(
            (layer, *self._row(pair, found))
            for pair, overlaps in self.by_layer.items()
            for layer, found in zip(self.layers, overlaps, strict=True)
            if found.first or found.second
        )
        return ReportFigure(
            "overlap-by-layer",
            "Overlap by layer",
            "neurons in both, percent of the smaller choice in that layer",
            "Each row is a layer, each column a pair of choices, numbered in the order of this report. An "
            "empty cell means that one of the two has no neuron in that layer.",
            Table(columns, rows),
            self._draw_layers,
        )

    def _draw_layers(self, fig: MplFigure) -> None:
        pairs = list(self.by_layer)[:_MAX_DRAWN]
        layers = self.layers[:_MAX_LAYERS]
        cells = np.array(
            [[self.by_layer[pair][i].shared_share for pair in pairs] for i in range(len(layers))]
        )
        axes = new_axes(fig, 0.55 + max(0.19 * len(layers), 0.5))
        rows = [text.label(layer, 24) if layer != NO_LAYER else "elsewhere" for layer in layers]
        columns = [f"{a + 1} and {b + 1}" for a, b in pairs]
        heatmap(axes, cells, rows, columns, top=1.0, small=len(layers) > 40, slanted=False)


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


def _tensor_overlap(pair: Sequence[Chosen | None]) -> PairOverlap:
    """The overlap in one tensor, which at least one of the two selections has."""
    none: NDArray[np.int64] = np.empty(0, np.int64)
    a, b = (none if chosen is None else chosen.index for chosen in pair)
    total = max((chosen.layout.count for chosen in pair if chosen is not None), default=1)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return PairOverlap(len(a), len(b), shared, len(a) * len(b) / total)
