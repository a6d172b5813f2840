"""The most sensitive neurons, one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import text
from .drawing import ACCENT, FAINT, INK, WIDTH, Canvas, quiet
from .figure import Column, Figure, Table
from .layer_map import places
from .subjects import Items

__all__ = ["sensitive_figure"]

_SHOWN = 20


def sensitive_figure(items: Items, score: str, *, id: str = "sensitive") -> Figure:
    """The neurons or units with the highest scores.

    ``smaller`` is the share of all of them whose base vector is smaller: 0% for the smallest vector. Norms
    and changes are NaN where the scores file holds no sums.
    """
    first = items.order[:_SHOWN]
    count = len(items)
    where = places(items.tensors)
    norm = np.full(count, np.nan) if items.base_sq is None else np.sqrt(items.base_sq)
    moved = np.full(count, np.nan) if items.delta_sq is None else np.sqrt(items.delta_sq)
    ordered = np.sort(norm)
    rows = []
    for rank, item in enumerate(first, 1):
        tensor = items.tensors[items.tensor[item]]
        size, change = float(norm[item]), float(moved[item])
        smaller = float(np.searchsorted(ordered, norm[item])) / count if size == size else np.nan
        rows.append(
            (
                rank,
                float(items.score[item]),
                tensor,
                int(items.index[item]),
                where[tensor].layer,
                where[tensor].kind,
                size,
                smaller,
                change / size if size > 0 else np.nan,
            )
        )
    columns = (
        Column("rank", "", text.amount),
        Column("score", f"{score} score", text.number, bar=True),
        Column("tensor", "tensor", text.label),
        Column("index", "index", text.amount),
        Column("layer", "layer", text.label),
        Column("kind", "kind of weight", text.label),
        Column("norm", "norm of the base vector", text.number),
        Column("smaller", "vectors smaller", text.percent),
        Column("relative_change", "relative change", text.number),
    )
    word = items.word
    return Figure(
        id,
        f"The most sensitive {word}s",
        f"{score} score; norm of the {word}'s vector in the base; its change over that norm",
        f"A line is a {word}"
        + (", named by the first of its neurons" if word == "unit" else "")
        + f". Where most of the norms are small (the share of {word}s with a smaller vector is near 0%), the "
        "score may tell small vectors rather than important ones.",
        Table(columns, tuple(rows)),
        lambda canvas: _draw(canvas, rows, score),
        as_table=True,
    )


def _draw(canvas: Canvas, rows: Sequence[tuple[object, ...]], score: str) -> None:
    canvas.set_size_inches(WIDTH, 0.6 + 0.19 * len(rows))
    axes = canvas.add_subplot()
    place = np.arange(len(rows))
    values = np.array([float(str(row[1])) for row in rows])
    axes.hlines(place, min(0.0, values.min(initial=0.0)), values, color=FAINT, linewidth=2)
    axes.plot(values, place, "o", color=ACCENT, markersize=5)
    for y, value in zip(place, values, strict=True):
        axes.annotate(
            text.number(value), (value, y), (6, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(place, [f"{text.label(str(row[2]), 40)} [{row[3]}]" for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.set_xlabel(f"{score} score")
    quiet(axes, grid="x")
