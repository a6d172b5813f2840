"""The layer map: how many neurons are chosen in each layer and kind of weight. As value, figure and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..neurons.tensor_names import layer_and_kind
from ..patch.patch import Patch
from ..scoring.scores import Scores
from ..selection.selection import Selection
from ..tensors.arrays import Int64Array
from ..text import commas, label, natural_key, percent
from .figure import ReportFigure
from .plotting import MplFigure, heatmap

#: The row of the tensors outside all layers, in a model that has layers.
NO_LAYER = ""
_REST, _ALL = "others", "all kinds"
_MAX_CELLS = 1 << 22
_MOST_ROWS, _MOST_COLUMNS = 128, 12  # of a figure
BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


class TensorLocation(NamedTuple):
    """The layer and the kind of a tensor: its row and its column in the layer map."""

    layer: str
    kind: str


def locate_tensors(names: Iterable[str]) -> dict[str, TensorLocation]:
    """The layer and kind of each tensor; where no name has a layer number, its module and own name."""
    found = {name: TensorLocation(*layer_and_kind(name)) for name in names}
    if any(location.layer for location in found.values()):
        return found
    return {name: TensorLocation(*name.rpartition(".")[::2]) for name in found}


def sorted_layers(locations: Iterable[TensorLocation]) -> list[str]:
    """The layers of tensors in natural order, `NO_LAYER` last."""
    return sorted({at.layer for at in locations}, key=lambda name: (name == NO_LAYER, natural_key(name)))


@dataclass(frozen=True, eq=False)
class LayerMap:
    """How many neurons are chosen in each layer and kind of weight."""

    layers: tuple[str, ...]  # the rows, in natural order; `NO_LAYER`, for tensors outside all layers, is last
    kinds: tuple[str, ...]  # the columns, in natural order; kinds that are in no layer are last
    chosen: Int64Array  # the chosen neurons ``[layers, kinds]``
    totals: Int64Array  # all neurons; 0: there is no such tensor

    @classmethod
    def of_counts(cls, counts: Mapping[str, tuple[int, int]]) -> LayerMap:
        """The map of tensors by name, each with its number of chosen neurons and of all neurons."""
        locations = locate_tensors(counts)
        layers = sorted_layers(locations.values())
        by_kind = sorted(locations.values(), key=lambda at: (at.layer == NO_LAYER, natural_key(at.kind)))
        kinds = list(dict.fromkeys(at.kind for at in by_kind))
        if len(layers) * len(kinds) > _MAX_CELLS:  # not the names of a model: almost all cells would be empty
            locations = {name: TensorLocation(at.layer, _ALL) for name, at in locations.items()}
            kinds = [_ALL]
        rows, columns = (dict(zip(names, range(len(names)), strict=True)) for names in (layers, kinds))
        chosen, totals = np.zeros((2, len(layers), len(kinds)), np.int64)
        for name, (tensor_chosen, tensor_total) in counts.items():
            cell = rows[locations[name].layer], columns[locations[name].kind]
            chosen[cell] += tensor_chosen
            totals[cell] += tensor_total
        return cls(tuple(layers), tuple(kinds), chosen, totals)

    @classmethod
    def of_patch(cls, patch: Patch) -> LayerMap:
        """The map of the neurons that a patch replaces, companion biases not counted."""
        return cls.of_counts({name: (t.count, t.layout.count) for name, t in patch.own.items()})

    @classmethod
    def of_scores(cls, scores: Scores, selection: Selection) -> LayerMap:
        """The map of the scored neurons, and of those that a selection chooses."""
        chosen = selection.counts
        return cls.of_counts({n: (chosen.get(n, 0), tensor.neurons) for n, tensor in scores.tensors.items()})

    @property
    def share(self) -> NDArray[np.float64]:
        """The chosen share of each cell, float64 ``[layers, kinds]``; NaN for a cell without neurons."""
        with np.errstate(invalid="ignore"):
            return self.chosen / self.totals

    @property
    def neurons(self) -> int:
        """How many neurons are chosen."""
        return int(self.chosen.sum())

    @property
    def total(self) -> int:
        """How many neurons there are."""
        return int(self.totals.sum())

    @cached_property
    def prefix(self) -> str:
        """The common prefix of the layers' names, up to a dot. Labels leave it out."""
        inside = [name.split(".")[:-1] for name in self.layers if name != NO_LAYER]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*inside, strict=False))
        return "".join(f"{first}." for first, *_ in shared)

    @property
    def row_labels(self) -> tuple[str, ...]:
        """Short, printable names of the layers."""
        return tuple(
            "elsewhere" if name == NO_LAYER else label(name.removeprefix(self.prefix), 24)
            for name in self.layers
        )

    @property
    def column_labels(self) -> tuple[str, ...]:
        """Short, printable names of the kinds."""
        return tuple(label(name, 28) for name in self.kinds)

    def folded(self, layers: int, kinds: int) -> LayerMap:
        """The map with at most so many rows and columns. Those with the fewest chosen neurons become one."""
        return self._folded_columns(kinds)._transposed()._folded_columns(layers)._transposed()

    def _folded_columns(self, count: int) -> LayerMap:
        if len(self.kinds) <= count:
            return self
        kept = np.sort(np.argsort(-self.chosen.sum(axis=0), kind="stable")[: count - 1])
        names = (*(self.kinds[i] for i in kept), f"{len(self.kinds) - len(kept):,} {_REST}")
        cells = (self.chosen, self.totals)
        folded = (np.column_stack([c[:, kept], np.delete(c, kept, axis=1).sum(axis=1)]) for c in cells)
        return LayerMap(self.layers, names, *folded)

    def _transposed(self) -> LayerMap:
        return LayerMap(self.kinds, self.layers, self.chosen.T, self.totals.T)

    @property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """The chosen neurons and all neurons of each kind."""
        counts = zip(self.chosen.sum(axis=0).tolist(), self.totals.sum(axis=0).tolist(), strict=True)
        return dict(zip(self.kinds, counts, strict=True))

    def rows(self) -> Iterator[tuple[str, str, int, int, float]]:
        """The layer, kind, chosen neurons, all neurons and chosen share of every cell that has neurons."""
        for i, j in np.argwhere(self.totals).tolist():
            chosen, total = int(self.chosen[i, j]), int(self.totals[i, j])
            yield self.layers[i], self.kinds[j], chosen, total, chosen / total


def layer_map_figure(
    found: LayerMap, *, suffix: str = "", word: str = "chosen", of_patch: bool = False
) -> ReportFigure:
    """The layer map as a figure. ``word``: what its neurons are; ``of_patch``: only its weights are in it."""
    layers = f" ({label(found.prefix, 40)}N)" if found.prefix else ""
    empty = "is a weight that the patch does not change" if of_patch else "means that there is no such weight"
    verdict = _verdict(found, word, " of the weights that the patch changes" if of_patch else "")
    draw = partial(draw_layer_map, found=found)
    return ReportFigure.of("map", suffix, found.rows(), draw, verdict, word=word, layers=layers, empty=empty)


def _verdict(found: LayerMap, word: str, which: str) -> str:
    if not found.neurons:
        return ""
    kinds, all_kinds = found.chosen.sum(axis=0), found.totals.sum(axis=0)
    most = int(np.argmax(kinds))
    text = (
        f"{commas(found.neurons)} of {commas(found.total)} neurons{which} are {word} "
        f"({percent(found.neurons / found.total)})."
    )
    if len(found.kinds) > 1:
        text += (
            f" {percent(kinds[most] / found.neurons)} of them are in {found.column_labels[most]}, "
            f"which has {percent(all_kinds[most] / found.total)} of the neurons."
        )
    return text


def draw_layer_map(fig: MplFigure, found: LayerMap) -> None:
    """Draw the share of each cell; of many rows or columns, those with the fewest chosen ones as one."""
    found = found.folded(_MOST_ROWS, _MOST_COLUMNS)
    mesh = heatmap(fig, found.share, found.row_labels, found.column_labels, ylabel="layer")
    bar = fig.colorbar(mesh, ax=mesh.axes, location="bottom", fraction=0.06, aspect=45, pad=0.03, shrink=0.6)
    bar.outline.set_visible(False)
    ticks = [0.0, mesh.norm.vmax / 2, mesh.norm.vmax]
    bar.set_ticks(ticks, labels=[percent(tick) for tick in ticks])


def layer_map_lines(
    found: LayerMap, *, blocks: bool = True, layers: int = 40, kinds: int = 12
) -> Iterator[str]:
    """The map as text: a line per kind of weight, a character per layer, or several, in ASCII or blocks."""
    if not found.neurons:
        return
    folded = found.folded(len(found.layers), kinds)
    edges = [each[0] for each in np.array_split(np.arange(len(found.layers)), min(len(found.layers), layers))]
    cells = (np.add.reduceat(each, edges, axis=0) for each in (folded.chosen, folded.totals))
    grouped = LayerMap(folded.layers, folded.kinds, *cells)
    top, scale = float(np.nanmax(grouped.share)), BLOCKS if blocks else _ASCII
    width = max(len(name) for name in folded.column_labels)
    shares = folded.chosen.sum(axis=0) / folded.totals.sum(axis=0)
    for name, column, share in zip(folded.column_labels, grouped.share.T, shares, strict=True):
        line = "".join(_cell(value, top, scale) for value in column)
        yield f"{name.ljust(width)}  {line}  {percent(share).rjust(6)}"
    yield (
        f"{''.ljust(width)}  {len(found.layers)} layers from left to right, "
        f"{scale[-1]} is the maximum: {percent(top)}"
    )


def _cell(value: float, top: float, scale: str) -> str:
    if value != value:
        return " "
    # The lowest character means at least one neuron, the space means none.
    return scale[0 if value == 0 else max(1, round(value / top * (len(scale) - 1)))]
