"""The map of layers by kinds of weight as a figure, and as a few lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..text import amount, label, percent
from .drawing import SCALE, SURFACE, WIDTH, Canvas
from .figure import Column, Figure, Table
from .layer_map import LayerMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLOCKS", "map_figure", "map_lines", "number_cells"]

_MOST_ROWS, _MOST_COLUMNS = 128, 16
BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


def map_figure(found: LayerMap, *, id: str = "map", word: str = "chosen", of_patch: bool = False) -> Figure:
    """The map as a figure.

    Parameters
    ----------
    found:
        The map. One with very many rows or columns is drawn with the least chosen ones folded into one.
    id:
        Of the figure.
    word:
        What the neurons are, for the title: ``sensitive``, ``replaced``.
    of_patch:
        Whether it is the map of a patch, which knows only of the weights that it touches.
    """
    columns = (
        Column("layer", "layer", label),
        Column("kind", "kind of weight", label),
        Column("chosen", word, amount),
        Column("total", "neurons", amount),
        Column("share", "share", percent, bar=True),
    )
    rows = tuple((*row, row[2] / row[3]) for row in found.rows())
    return Figure(
        id,
        f"Where the {word} neurons are",
        f"{word} neurons, percent of those of that weight",
        "A row is a layer"
        + (f" ({label(found.prefix, 40)}N)" if found.prefix else "")
        + ", a column a kind of weight, a cell the neurons of one weight (of several experts, "
        f"all of them). The number is the percentage that is {word}; the lighter the cell, the larger it is. "
        + (
            "An empty place is a weight that the patch leaves alone."
            if of_patch
            else "An empty place: no such weight."
        ),
        Table(columns, rows),
        lambda canvas: _draw(canvas, found.folded(_MOST_ROWS, _MOST_COLUMNS)),
        _verdict(found, word, " of the weights it touches" if of_patch else ""),
    )


def _verdict(found: LayerMap, word: str, which: str) -> str:
    if not found.neurons:
        return ""
    kinds, all_kinds = found.chosen.sum(axis=0), found.totals.sum(axis=0)
    most = int(np.argmax(kinds))
    text = (
        f"{amount(found.neurons)} of {amount(found.total)} neurons{which} are {word} "
        f"({percent(found.neurons / found.total)})."
    )
    if len(found.kinds) > 1:
        text += (
            f" {percent(kinds[most] / found.neurons)} of them are in {found.column_labels[most]}, "
            f"which has {percent(all_kinds[most] / found.total)} of the neurons."
        )
    return text


def _draw(canvas: Canvas, found: LayerMap) -> None:
    from matplotlib.colors import Normalize

    rows, kinds = found.totals.shape
    height = 0.21 if rows <= 48 else 0.15
    slanted = 0.042 * max(len(name) for name in found.column_labels)
    canvas.set_size_inches(WIDTH, 0.7 + slanted + max(height * rows, 0.4))
    axes = canvas.add_subplot()
    share = found.share
    top = float(np.nanmax(share, initial=0.0)) or 1.0
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(share), cmap=SCALE, norm=Normalize(0.0, top), linewidth=1.2, edgecolor=SURFACE
    )
    number_cells(axes, share, top, small=rows > 48 or kinds > 10)
    axes.set_ylim(rows, 0)
    axes.set_xticks(
        np.arange(kinds) + 0.5, found.column_labels, rotation=35, ha="left", rotation_mode="anchor"
    )
    axes.xaxis.tick_top()
    step = 1 if height > 0.2 else 2
    axes.set_yticks(np.arange(0, rows, step) + 0.5, found.row_labels[::step])
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = canvas.colorbar(mesh, ax=axes, location="bottom", fraction=0.06, aspect=45, pad=0.03, shrink=0.6)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    ticks = [0.0, top / 2, top]
    bar.set_ticks(ticks, labels=[percent(tick) for tick in ticks])


def number_cells(axes: Axes, share: NDArray[np.float64], top: float, *, small: bool = False) -> None:
    """Write the percentage into each cell, in what can be read there; ``top`` is the lightest cell's."""
    for (row, column), value in np.ndenumerate(share):
        if value == value:
            light = value / top > 0.55
            axes.text(
                column + 0.5,
                row + 0.53,
                _percent(value),
                ha="center",
                va="center",
                fontsize=6.3 if small else 7.5,
                color="#101418" if light else "#f4f6f8",
            )


def _percent(value: float) -> str:
    """A percentage without its sign, in at most four characters."""
    percent = 100 * value
    if percent == 0:
        return "0"
    if percent < 0.01:
        return "<.01"
    return f"{percent:.2f}" if percent < 0.995 else f"{percent:.1f}" if percent < 99.95 else "100"


def map_lines(found: LayerMap, *, blocks: bool = True, layers: int = 40, kinds: int = 12) -> Iterator[str]:
    """The map as lines for a terminal: a kind a line, a character a layer.

    Parameters
    ----------
    found:
        The map.
    blocks:
        Whether block characters can be printed; otherwise ASCII.
    layers, kinds:
        At most so many of each; neighbouring layers share a character where there are more, and the kinds
        with the fewest chosen become one.
    """
    if not found.neurons:
        return
    folded = found.folded(len(found.layers), kinds)
    groups = np.array_split(np.arange(len(found.layers)), min(len(found.layers), layers))
    chosen = np.array([folded.chosen[group].sum(axis=0) for group in groups])
    totals = np.array([folded.totals[group].sum(axis=0) for group in groups])
    with np.errstate(invalid="ignore"):
        share = chosen / totals
    top = float(np.nanmax(share))
    scale = BLOCKS if blocks else _ASCII
    width = max(len(name) for name in folded.column_labels)
    for column, name in enumerate(folded.column_labels):
        cells = "".join(_cell(value, top, scale) for value in share[:, column])
        taken, there = int(folded.chosen[:, column].sum()), int(folded.totals[:, column].sum())
        yield f"{name.ljust(width)}  {cells}  {percent(taken / there).rjust(6)}"
    yield (
        f"{''.ljust(width)}  {len(found.layers)} layers from left to right, "
        f"{percent(top)} at the most: {scale[-1]}"
    )


def _cell(value: float, top: float, scale: str) -> str:
    if value != value:
        return " "
    # The lowest mark is for any at all, the space for none.
    return scale[0 if value == 0 else max(1, round(value / top * (len(scale) - 1)))]
