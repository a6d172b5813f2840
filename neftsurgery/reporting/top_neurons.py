"""The neurons with the highest scores, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import text
from .figure import Column, ReportFigure, Table
from .inputs import Candidates
from .layer_map import locate_tensors
from .plotting import ACCENT, FAINT, INK, MplFigure, annotate, new_axes

__all__ = ["top_neurons_figure"]

_SHOWN = 20  # rows of the table


def top_neurons_figure(candidates: Candidates, score: str, *, id: str = "sensitive") -> ReportFigure:
    """The neurons or units with the highest scores.

    The column ``smaller`` is the share of all candidates that have a smaller base vector. Norms and changes
    are NaN if the scores file holds no sums.
    """
    top = candidates.order[:_SHOWN]
    count = len(candidates)
    locations = locate_tensors(candidates.tensors)
    norm = np.full(count, np.nan) if candidates.base_sq is None else np.sqrt(candidates.base_sq)
    moved = np.full(count, np.nan) if candidates.delta_sq is None else np.sqrt(candidates.delta_sq)
    ordered = np.sort(norm)
    rows = []
    for rank, i in enumerate(top, 1):
        tensor = candidates.tensors[candidates.tensor[i]]
        size, change = float(norm[i]), float(moved[i])
        smaller = float(np.searchsorted(ordered, norm[i])) / count if size == size else np.nan
        rows.append(
            (
                rank,
                float(candidates.score[i]),
                tensor,
                int(candidates.index[i]),
                locations[tensor].layer,
                locations[tensor].kind,
                size,
                smaller,
                change / size if size > 0 else np.nan,
            )
        )
    columns = (
        Column("rank", "", text.commas),
        Column("score", f"{score} score", text.four_digits, bar=True),
        Column("tensor", "tensor", text.label),
        Column("index", "index", text.commas),
        Column("layer", "layer", text.label),
        Column("kind", "kind of weight", text.label),
        Column("norm", "norm of the base vector", text.four_digits),
        Column("smaller", "vectors smaller", text.percent),
        Column("relative_change", "relative change", text.four_digits),
    )
    word = candidates.word
    return ReportFigure(
        id,
        f"The most sensitive {word}s",
        f"{score} score; norm of the {word}'s vector in the base; change relative to that norm",
        f"Each row is a {word}"
        + (", named by the first of its neurons" if word == "unit" else "")
        + f". If most of the norms are small (few {word}s have a smaller vector), the score may show small "
        "vectors instead of important ones.",
        Table(columns, tuple(rows)),
        lambda fig: _draw(fig, rows, score),
        as_table=True,
    )


def _draw(fig: MplFigure, rows: Sequence[tuple[object, ...]], score: str) -> None:
    axes = new_axes(fig, 0.6 + 0.19 * len(rows), grid="x", xlabel=f"{score} score")
    ys = np.arange(len(rows))
    values = np.array([float(str(row[1])) for row in rows])
    axes.hlines(ys, min(0.0, values.min(initial=0.0)), values, color=FAINT, linewidth=2)
    axes.plot(values, ys, "o", color=ACCENT, markersize=5)
    for y, value in zip(ys, values, strict=True):
        annotate(axes, text.four_digits(value), (value, y), (6, 0), va="center", color=INK)
    axes.set_yticks(ys, [f"{text.label(str(row[2]), 40)} [{row[3]}]" for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.16)
