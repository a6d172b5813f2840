"""The distribution of the scores by kind of weight, the score at which the budget cuts, the top neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import text
from ..tensors.arrays import Int64Array
from .figure import Column, ReportFigure, Table
from .inputs import Candidates
from .layer_map import locate_tensors
from .plotting import ACCENT, CONTRAST, FAINT, INK, MUTED, MplFigure, annotate, log_ticks, new_axes

__all__ = ["ScoreDistribution", "top_neurons_figure"]

_BINS = 72
_KINDS = 12
#: A score whose maximum is more than this many times its median gets a logarithmic axis.
_SKEWED = 8.0
_SHOWN = 20  # rows of the table


@dataclass(frozen=True, eq=False)
class ScoreDistribution:
    """One histogram of a score for each kind of weight."""

    # The name of the score, and what it scores: ``neuron`` or ``unit``.
    score: str
    word: str
    log: bool  # whether the bins have equal width in the logarithm of the score
    # Float64 ``[bins + 1]``: the bin edges as scores. The last bin includes both of its edges.
    edges: NDArray[np.float64]
    kinds: tuple[str, ...]
    # Int64 ``[kinds, bins]``: the candidates in each bin, and how many of them are chosen.
    counts: Int64Array
    chosen: Int64Array
    zeros: Int64Array  # int64 ``[kinds]``: candidates with a score of 0, which a logarithmic axis cannot show
    # The lowest chosen score, if a single score separates the chosen from the rest; else None.
    cut: float | None

    @classmethod
    def of(cls, candidates: Candidates, score: str, *, one_cut: bool) -> ScoreDistribution:
        """The distribution of ``candidates``; ``one_cut``: one score separates the chosen from the rest."""
        values = np.clip(candidates.score.astype(np.float64), -1e300, 1e300)
        log = _is_skewed(values)
        shown = values > 0 if log else np.ones(len(values), np.bool_)
        edges = _edges(values[shown], log)
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
        size = len(candidates.kinds), _BINS

        def histogram(mask: NDArray[np.bool_]) -> Int64Array:
            flat = np.bincount(candidates.kind[mask] * _BINS + bins[mask], minlength=size[0] * size[1])
            return flat.reshape(size)

        cut = (
            float(candidates.score[candidates.chosen].min()) if one_cut and candidates.chosen.any() else None
        )
        return cls(
            score,
            candidates.word,
            log,
            edges,
            candidates.kinds,
            histogram(shown),
            histogram(shown & candidates.chosen),
            np.bincount(candidates.kind[~shown], minlength=size[0]),
            cut,
        )

    def figure(self, id: str = "distribution") -> ReportFigure:
        """The histograms as a figure of the report."""
        columns = (
            Column("kind", "kind of weight", text.label),
            Column("from", f"{self.score} from", text.four_digits),
            Column("to", "to", text.four_digits),
            Column("count", f"{self.word}s", text.commas),
            Column("chosen", "chosen", text.commas),
        )
        rows: list[tuple[str, float, float, int, int]] = []
        for number, kind in enumerate(self.kinds):
            if self.zeros[number]:
                rows.append((kind, 0.0, 0.0, int(self.zeros[number]), 0))
            for bin in np.flatnonzero(self.counts[number]):
                low, high = float(self.edges[bin]), float(self.edges[bin + 1])
                rows.append((kind, low, high, int(self.counts[number, bin]), int(self.chosen[number, bin])))
        scale = "logarithmic axis" if self.log else "linear axis"
        return ReportFigure(
            id,
            "How the scores are distributed",
            f"{self.score} score of a {self.word}, {scale}; height: square root of the share",
            f"One curve per kind of weight. The further right, the more sensitive its {self.word}s are. The "
            "dark part is chosen; the number on the right is its share of that kind."
            + (" The dashed line is the cut: the lowest score that the budget chooses." if self.cut else "")
            + (
                f" The number on the left is the share of {self.word}s with a score of 0, which this axis "
                "cannot show."
                if self.zeros.any()
                else ""
            ),
            Table(columns, tuple(rows)),
            self._draw,
        )

    def _draw(self, fig: MplFigure) -> None:
        shown = np.sort(np.argsort(-self.chosen.sum(axis=1), kind="stable")[:_KINDS])
        axes = new_axes(fig, 0.75 + 0.46 * len(shown), grid="x", xlabel=f"{self.score} score")
        edges = np.log10(self.edges) if self.log else self.edges
        totals = np.maximum(self.counts.sum(axis=1) + self.zeros, 1)
        # Few neurons are chosen. The square root keeps them visible.
        height = np.sqrt(self.counts / totals[:, None])
        scale = 0.86 / max(float(height.max()), 1e-9)
        at_edge = ("axes fraction", "data")
        for row, kind in enumerate(shown[::-1]):
            for values, colour in ((self.counts, FAINT), (self.chosen, ACCENT)):
                top = row + scale * np.sqrt(values[kind] / totals[kind])
                axes.stairs(top, edges, baseline=row, fill=True, color=colour, linewidth=0)
            axes.plot(edges[[0, -1]], [row, row], color=MUTED, linewidth=0.5)
            share = text.percent(self.chosen[kind].sum() / totals[kind])
            annotate(axes, share, (1, row), (4, 3), xycoords=at_edge, color=INK, annotation_clip=False)
            if self.zeros[kind]:
                zeros = f"{text.percent(self.zeros[kind] / totals[kind])} at 0"
                annotate(axes, zeros, (0, row), (3, 3), xycoords=at_edge, color=MUTED, fontsize=7)
        if self.cut is not None and (self.cut > 0 or not self.log):
            at = np.log10(self.cut) if self.log else self.cut
            axes.axvline(at, color=CONTRAST, linestyle=(0, (4, 2)), linewidth=1.2)
            style = {"ha": "center", "va": "bottom", "color": CONTRAST, "annotation_clip": False}
            annotate(axes, f"cut {text.four_digits(self.cut)}", (at, len(shown)), (0, 2), **style)
        axes.set_yticks(np.arange(len(shown)) + 0.12, [text.label(self.kinds[k], 28) for k in shown[::-1]])
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.05, len(shown)))
        if self.log:
            axes.set_xticks(*log_ticks(float(edges[0]), float(edges[-1])))


def _is_skewed(values: NDArray[np.float64]) -> bool:
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return False
    return bool(positive.max() > _SKEWED * np.median(positive))


def _edges(values: NDArray[np.float64], log: bool) -> NDArray[np.float64]:
    """The edges of bins of equal width from the lowest to the highest value."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if log:
        edges = np.logspace(np.log10(low), np.log10(high), _BINS + 1) if low < high else None
    else:
        edges = np.linspace(low, high, _BINS + 1) if low < high else None
    if edges is None or not (np.diff(edges) > 0).all():
        half = abs(low) / 2 or 0.5
        return np.linspace(low - half, low + half, _BINS + 1)
    edges[0], edges[-1] = low, high  # exactly, whatever the rounding
    return edges


def top_neurons_figure(candidates: Candidates, score: str, *, id: str = "sensitive") -> ReportFigure:
    """The neurons or units with the highest scores.

    ``smaller`` is the share of all that have a smaller base vector. Without sums, norms and changes are NaN.
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
