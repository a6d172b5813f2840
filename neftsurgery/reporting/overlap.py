"""What several selections have in common: of each two of them, in all and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import text
from ..selection.selection import Chosen, Selection, companion_biases
from .drawing import SCALE, SURFACE, WIDTH, Canvas
from .figure import Column, Figure, Table
from .layer_map import OUTSIDE, natural, places
from .map_figure import number_cells

__all__ = ["Overlaps", "Pairing"]

_DRAWN = 12
_LAYERS = 96


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two selections in one layer, or in all.

    Attributes
    ----------
    first, second:
        How many neurons each has there.
    shared:
        How many are in both.
    chance:
        How many would be, on average, if each had drawn its number from each tensor at random.
    """

    first: int
    second: int
    shared: int
    chance: float

    def __add__(self, other: Pairing) -> Pairing:
        return Pairing(
            self.first + other.first,
            self.second + other.second,
            self.shared + other.shared,
            self.chance + other.chance,
        )

    @property
    def jaccard(self) -> float:
        """Shared over either; NaN if both are empty."""
        either = self.first + self.second - self.shared
        return self.shared / either if either else np.nan

    @property
    def shared_share(self) -> float:
        """Shared over the smaller of the two; NaN if one is empty."""
        smaller = min(self.first, self.second)
        return self.shared / smaller if smaller else np.nan

    @property
    def chance_share(self) -> float:
        """What `shared_share` would be by chance."""
        smaller = min(self.first, self.second)
        return self.chance / smaller if smaller else np.nan


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Several selections beside each other.

    Attributes
    ----------
    names:
        What they are called.
    pairs:
        Per two of them, by their numbers.
    layers:
        The layers that any of them touches, in natural order.
    by_layer:
        Per two of them, layer by layer.
    unfit:
        Tensors that have another shape or other neuron axes in one than in another: not compared.
    """

    names: tuple[str, ...]
    pairs: dict[tuple[int, int], Pairing]
    layers: tuple[str, ...]
    by_layer: dict[tuple[int, int], tuple[Pairing, ...]]
    unfit: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], selections: Sequence[Selection]) -> Overlaps:
        """Compare selections; biases that merely follow are left out."""
        followers = frozenset[str]().union(*(companion_biases(selection.facts) for selection in selections))
        every = sorted({name for selection in selections for name in selection.tensors} - followers)
        where = places(every)
        shapes = {
            name: {
                (chosen.info.shape, chosen.layout.axes)
                for selection in selections
                if (chosen := selection.tensors.get(name)) is not None
            }
            for name in every
        }
        unfit = {name: None for name in every if len(shapes[name]) > 1}
        layers = sorted(
            {at.layer for at in where.values()}, key=lambda name: (name == OUTSIDE, natural(name))
        )
        pairs: dict[tuple[int, int], Pairing] = {}
        by_layer: dict[tuple[int, int], tuple[Pairing, ...]] = {}
        for pair in combinations(range(len(selections)), 2):
            found = {layer: Pairing(0, 0, 0, 0.0) for layer in layers}
            for name in every:
                if name not in unfit:
                    found[where[name].layer] += _pairing([selections[n].tensors.get(name) for n in pair])
            by_layer[pair] = tuple(found.values())
            pairs[pair] = sum(found.values(), Pairing(0, 0, 0, 0.0))
        return cls(tuple(names), pairs, tuple(layers), by_layer, tuple(unfit))

    @property
    def verdict(self) -> str:
        """The most alike two, in a sentence."""
        best = max(self.pairs, key=lambda pair: np.nan_to_num(self.pairs[pair].jaccard))
        found = self.pairs[best]
        a, b = (text.label(self.names[n]) for n in best)
        sentence = (
            f"{a} and {b} share {text.amount(found.shared)} neurons: {text.percent(found.shared_share)} of "
            f"the smaller one, where chance would give {text.percent(found.chance_share)}."
        )
        if len(self.pairs) > 1:
            sentence = f"Most alike: {sentence}"
        if self.unfit:
            sentence += f" {len(self.unfit):,} tensors of different shapes are left out."
        return sentence

    def figure(self) -> Figure:
        """Each two of them, in all."""
        rows = tuple(self._row(pair, found) for pair, found in self.pairs.items())
        return Figure(
            "overlap",
            "What they have in common",
            "Jaccard index: neurons in both over neurons in either, in percent",
            "A cell is two choices beside each other: 100 if they are the same, 0 if they share nothing. By "
            "chance is what two choices with these numbers per tensor would share, drawn at random.",
            Table(_columns("jaccard"), rows),
            self._draw,
            self.verdict,
        )

    def _row(self, pair: tuple[int, int], found: Pairing) -> tuple[Any, ...]:
        """As `_columns` are."""
        first, second = (self.names[number] for number in pair)
        return (
            first,
            second,
            found.first,
            found.second,
            found.shared,
            found.jaccard,
            found.shared_share,
            found.chance_share,
        )

    def _draw(self, canvas: Canvas) -> None:
        shown = min(len(self.names), _DRAWN)
        cells = np.full((shown, shown), np.nan)
        for (a, b), found in self.pairs.items():
            if b < shown:
                cells[a, b] = cells[b, a] = found.jaccard
        np.fill_diagonal(cells, 1.0)
        names = [text.label(name, 30) for name in self.names[:shown]]
        slanted = 0.042 * max(len(name) for name in names)
        canvas.set_size_inches(WIDTH, 0.4 + slanted + max(0.32 * shown, 0.7))
        axes = canvas.add_subplot()
        axes.pcolormesh(
            np.ma.masked_invalid(cells), cmap=SCALE, vmin=0, vmax=1, edgecolor=SURFACE, linewidth=1.2
        )
        number_cells(axes, cells, 1.0)
        axes.set_ylim(shown, 0)
        axes.set_yticks(np.arange(shown) + 0.5, names)
        axes.set_xticks(np.arange(shown) + 0.5, names, rotation=35, ha="left", rotation_mode="anchor")
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    def layers_figure(self) -> Figure:
        """Each two of them, layer by layer."""
        columns = (Column("layer", "layer", text.label), *_columns("shared_share"))
        rows = tuple(
            (layer, *self._row(pair, found))
            for pair, pairings in self.by_layer.items()
            for layer, found in zip(self.layers, pairings, strict=True)
            if found.first or found.second
        )
        return Figure(
            "overlap-by-layer",
            "What they have in common, layer by layer",
            "neurons in both, percent of the smaller choice in that layer",
            "A row is a layer, a column two choices, numbered in the order of this report. An empty place: "
            "one of the two has chosen nothing in that layer.",
            Table(columns, rows),
            self._draw_layers,
        )

    def _draw_layers(self, canvas: Canvas) -> None:
        pairs = list(self.by_layer)[:_DRAWN]
        layers = self.layers[:_LAYERS]
        cells = np.array(
            [[self.by_layer[pair][i].shared_share for pair in pairs] for i in range(len(layers))]
        )
        canvas.set_size_inches(WIDTH, 0.55 + max(0.19 * len(layers), 0.5))
        axes = canvas.add_subplot()
        axes.pcolormesh(
            np.ma.masked_invalid(cells), cmap=SCALE, vmin=0, vmax=1, edgecolor=SURFACE, linewidth=1.2
        )
        number_cells(axes, cells, 1.0, small=len(layers) > 40)
        axes.set_ylim(len(layers), 0)
        labels = [text.label(layer, 24) if layer != OUTSIDE else "elsewhere" for layer in layers]
        axes.set_yticks(np.arange(len(layers)) + 0.5, labels)
        axes.set_xticks(np.arange(len(pairs)) + 0.5, [f"{a + 1} and {b + 1}" for a, b in pairs])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def _columns(drawn: str) -> tuple[Column, ...]:
    """Of two selections beside each other; what the picture shows has a bar in the table as well."""
    columns = (
        ("first", "first", text.label),
        ("second", "second", text.label),
        ("first_neurons", "neurons", text.amount),
        ("second_neurons", "neurons", text.amount),
        ("shared", "in both", text.amount),
        ("jaccard", "Jaccard", text.percent),
        ("shared_share", "share of the smaller", text.percent),
        ("chance_share", "by chance", text.percent),
    )
    return tuple(Column(key, title, show, bar=key == drawn) for key, title, show in columns)


def _pairing(holders: Sequence[Chosen | None]) -> Pairing:
    """Two selections in one tensor, which at least one of them has."""
    none: NDArray[np.int64] = np.empty(0, np.int64)
    a, b = (none if chosen is None else chosen.index for chosen in holders)
    there = max((chosen.layout.count for chosen in holders if chosen is not None), default=1)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return Pairing(len(a), len(b), shared, len(a) * len(b) / there)
