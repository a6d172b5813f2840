"""The layer map as a figure, and as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..text import commas, label, percent
from .figure import Column, ReportFigure, Table
from .layer_map import LayerMap
from .plotting import FIGURE_WIDTH, MplFigure, heatmap

__all__ = ["BLOCKS", "layer_map_figure", "layer_map_lines"]

_MOST_ROWS, _MOST_COLUMNS = 128, 16
BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


def layer_map_figure(
    found: LayerMap, *, id: str = "map", word: str = "chosen", of_patch: bool = False
) -> ReportFigure:
    """The layer map as a figure of the report.

    Parameters
    ----------
    found:
        The map. If it has too many rows or columns to draw, those with the fewest chosen neurons are drawn as
        one.
    id:
        The id of the figure.
    word:
        What the neurons of the map are, for the title: ``sensitive``, ``replaced``.
    of_patch:
        Whether it is the map of a patch, which has only the weights that the patch changes.
    """
    columns = (
        Column("layer", "layer", label),
        Column("kind", "kind of weight", label),
        Column("chosen", word, commas),
        Column("total", "neurons", commas),
        Column("share", "share", percent, bar=True),
    )
    rows = tuple((*row, row[2] / row[3]) for row in found.rows())
    return ReportFigure(
        id,
        f"Where the {word} neurons are",
        f"{word} neurons, percent of those of that weight",
        "Each row is a layer"
        + (f" ({label(found.prefix, 40)}N)" if found.prefix else "")
        + ", each column a kind of weight, each cell the neurons of one weight (experts are counted "
        f"together). The number is the percentage of {word} neurons; lighter cells have more. "
        + (
            "An empty cell is a weight that the patch does not change."
            if of_patch
            else "An empty cell means that there is no such weight."
        ),
        Table(columns, rows),
        lambda fig: _draw(fig, found.folded(_MOST_ROWS, _MOST_COLUMNS)),
        _verdict(found, word, " of the weights that the patch changes" if of_patch else ""),
    )


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


def _draw(fig: MplFigure, found: LayerMap) -> None:
    rows, kinds = found.totals.shape
    height = 0.21 if rows <= 48 else 0.15
    slanted = 0.042 * max(len(name) for name in found.column_labels)
    fig.set_size_inches(FIGURE_WIDTH, 0.7 + slanted + max(height * rows, 0.4))
    axes = fig.add_subplot()
    top = float(np.nanmax(found.share, initial=0.0)) or 1.0
    small = rows > 48 or kinds > 10
    mesh = heatmap(axes, found.share, found.row_labels, found.column_labels, top=top, small=small)
    if rows > 48:  # every other label fits
        axes.set_yticks(np.arange(0, rows, 2) + 0.5, found.row_labels[::2])
    axes.set_ylabel("layer")
    bar = fig.colorbar(mesh, ax=axes, location="bottom", fraction=0.06, aspect=45, pad=0.03, shrink=0.6)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    ticks = [0.0, top / 2, top]
    bar.set_ticks(ticks, labels=[percent(tick) for tick in ticks])


def layer_map_lines(
    found: LayerMap, *, blocks: bool = True, layers: int = 40, kinds: int = 12
) -> Iterator[str]:
    """The layer map as text for a terminal: one line per kind of weight, one character per layer.

    Parameters
    ----------
    found:
        The map.
    blocks:
        Whether to use block characters; otherwise ASCII.
    layers, kinds:
        The largest number of each. If there are more layers, neighbouring ones share a character. If there
        are more kinds, those with the fewest chosen neurons become one.
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
        chosen_share = int(folded.chosen[:, column].sum()) / int(folded.totals[:, column].sum())
        yield f"{name.ljust(width)}  {cells}  {percent(chosen_share).rjust(6)}"
    yield (
        f"{''.ljust(width)}  {len(found.layers)} layers from left to right, "
        f"{scale[-1]} is the maximum: {percent(top)}"
    )


def _cell(value: float, top: float, scale: str) -> str:
    if value != value:
        return " "
    # The lowest character means at least one neuron, the space means none.
    return scale[0 if value == 0 else max(1, round(value / top * (len(scale) - 1)))]
