"""Scores by kind of weight, where the budget cuts them, the top neurons, and those quantization hurt most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import text
from ..scoring.scores import Scores
from ..tensors.arrays import Float64Array, Int64Array, Mask
from .figure import ReportFigure
from .inputs import MOST_SHOWN, Candidates
from .layer_map import locate_tensors
from .plotting import ACCENT, CONTRAST, FAINT, INK, MUTED, MplFigure, annotate, log_ticks, new_axes

_BINS = 72
_KINDS = 12
#: A score whose maximum is more than this many times its median gets a logarithmic axis.
_SKEWED = 8.0


class ScoreDistribution:
    """One histogram of a score for each kind of weight."""

    def __init__(self, candidates: Candidates, *, one_cut: bool) -> None:
        """``one_cut``: one score separates the chosen from the rest."""
        values = np.clip(candidates.score.astype(np.float64), -1e300, 1e300)
        self._candidates = candidates
        positive = values[values > 0]
        # Whether the bins have equal width in the logarithm of the score.
        self._log = bool(
            len(positive) and values.min() >= 0 and positive.max() > _SKEWED * np.median(positive)
        )
        shown = values > 0 if self._log else np.ones(len(values), np.bool_)
        # The bin edges as scores. The last bin includes both of its edges.
        self._edges = _edges(values[shown], self._log)
        bins = np.clip(np.searchsorted(self._edges, values, side="right") - 1, 0, _BINS - 1)
        size = len(candidates.kinds), _BINS

        def histogram(mask: Mask) -> Int64Array:
            flat = np.bincount(candidates.kind[mask] * _BINS + bins[mask], minlength=size[0] * size[1])
            return flat.reshape(size)

        # Of each kind, the candidates in each bin, how many of them are chosen, and those with a score of 0,
        # which a logarithmic axis cannot show.
        self._counts, self._chosen = histogram(shown), histogram(shown & candidates.chosen)
        self._zeros = np.bincount(candidates.kind[~shown], minlength=size[0])
        cuts = one_cut and candidates.chosen.any()
        self._cut = float(candidates.score[candidates.chosen].min()) if cuts else None  # the lowest chosen

    def figure(self, suffix: str) -> ReportFigure:
        """The histograms as a figure of the report."""
        score, word = self._candidates.score_name, self._candidates.word
        cut = " The dashed line is the cut: the lowest score that the budget chooses." if self._cut else ""
        zeros = "a score of 0, which this axis cannot show." if self._zeros.any() else ""
        zeros = zeros and f" The number on the left is the share of {word}s with {zeros}"
        rows: list[tuple[str, float, float, int, int]] = []
        for number, kind in enumerate(self._candidates.kinds):
            if self._zeros[number]:
                rows.append((kind, 0.0, 0.0, int(self._zeros[number]), 0))
            for bin in np.flatnonzero(self._counts[number]):
                low, high = self._edges[bin : bin + 2].tolist()
                counts = int(self._counts[number, bin]), int(self._chosen[number, bin])
                rows.append((kind, low, high, *counts))
        words = {"word": word, "score": score, "axis": "logarithmic" if self._log else "linear"}
        words |= {"cut": cut, "zeros": zeros, "note": self._candidates.note}
        return ReportFigure.of("distribution", suffix, rows, self._draw, **words)

    def _draw(self, fig: MplFigure) -> None:
        shown = np.sort(np.argsort(-self._chosen.sum(axis=1), kind="stable")[:_KINDS])
        score = f"{self._candidates.score_name} score"
        axes = new_axes(fig, 0.75 + 0.46 * len(shown), grid="x", xlabel=score)
        edges = np.log10(self._edges) if self._log else self._edges
        totals = np.maximum(self._counts.sum(axis=1) + self._zeros, 1)
        # Few neurons are chosen. The square root keeps them visible.
        scale = 0.86 / max(float(np.sqrt(self._counts / totals[:, None]).max()), 1e-9)
        at_edge = ("axes fraction", "data")
        for row, kind in enumerate(shown[::-1]):
            for values, colour in ((self._counts, FAINT), (self._chosen, ACCENT)):
                top = row + scale * np.sqrt(values[kind] / totals[kind])
                axes.stairs(top, edges, baseline=row, fill=True, color=colour, linewidth=0)
            axes.plot(edges[[0, -1]], [row, row], color=MUTED, linewidth=0.5)
            share = text.percent(self._chosen[kind].sum() / totals[kind])
            annotate(axes, share, (1, row), (4, 3), xycoords=at_edge, color=INK, annotation_clip=False)
            if self._zeros[kind]:
                zeros = f"{text.percent(self._zeros[kind] / totals[kind])} at 0"
                annotate(axes, zeros, (0, row), (3, 3), xycoords=at_edge, color=MUTED, fontsize=8.5)
        if self._cut is not None and (self._cut > 0 or not self._log):
            at = np.log10(self._cut) if self._log else self._cut
            axes.axvline(at, color=CONTRAST, linestyle=(0, (4, 2)), linewidth=1.2)
            style = {"ha": "center", "va": "bottom", "color": CONTRAST, "annotation_clip": False}
            annotate(axes, f"cut {text.four_digits(self._cut)}", (at, len(shown)), (0, 2), **style)
        kinds = [text.label(self._candidates.kinds[k], 28) for k in shown[::-1]]
        axes.set_yticks(np.arange(len(shown)) + 0.12, kinds)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.05, len(shown)))
        if self._log:
            axes.set_xticks(*log_ticks(float(edges[0]), float(edges[-1])))


def _edges(values: Float64Array, log: bool) -> Float64Array:
    """The edges of bins of equal width from the lowest to the highest value."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low < high:
        edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
        if (np.diff(edges) > 0).all():
            return edges
    half = abs(low) / 2 or 0.5
    return np.linspace(low - half, low + half, _BINS + 1)


def top_neurons_figure(candidates: Candidates, suffix: str) -> ReportFigure:
    """The neurons or units with the highest scores; what the file does not tell of them is NaN."""
    score, word, count = candidates.score_name, candidates.word, len(candidates)
    locations = locate_tensors(candidates.tensors)

    def root(sums: Float64Array | None) -> NDArray[Any]:
        return np.full(count, np.nan) if sums is None else np.sqrt(sums)

    norm, moved = root(candidates.base_sq), root(candidates.delta_sq)
    ordered = np.sort(norm)
    rows = []
    for rank, i in enumerate(candidates.order[:MOST_SHOWN], 1):
        tensor, size = candidates.tensors[candidates.tensor[i]], float(norm[i])
        smaller = float(np.searchsorted(ordered, size)) / count if size == size else np.nan
        change = float(moved[i]) / size if size > 0 else np.nan
        place = (tensor, int(candidates.index[i]), *locations[tensor])
        rows.append((rank, float(candidates.score[i]), *place, size, smaller, change))
    words = {"word": word, "score": score, "named": ", named by the first of its neurons" * (word == "unit")}
    words["note"] = candidates.note
    return ReportFigure.of("sensitive", suffix, rows, lambda fig: _draw(fig, rows, score), **words)


def _draw(fig: MplFigure, rows: Sequence[tuple[Any, ...]], score: str) -> None:
    axes = new_axes(fig, 0.6 + 0.19 * len(rows), grid="x", xlabel=f"{score} score")
    ys, values = np.arange(len(rows)), np.array([row[1] for row in rows])
    axes.hlines(ys, min(0.0, values.min(initial=0.0)), values, color=FAINT, linewidth=2)
    axes.plot(values, ys, "o", color=ACCENT, markersize=5)
    for y, value in zip(ys, values, strict=True):
        annotate(axes, text.four_digits(value), (value, y), (6, 0), va="center", color=INK)
    axes.set_yticks(ys, [f"{text.label(row[2], 40)} [{row[3]}]" for row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.16)


def quantization_figures(scores: Scores, suffix: str) -> tuple[ReportFigure, ...]:
    """What quantization cost neurons and weights; empty unless just one side of the scores stores codes."""
    if len(scores.quantized) != 1:
        return ()
    worst, weights = list[tuple[float, int, str, int]](), list[tuple[str, int, float, float]]()
    for batch in scores.batches("base_sq", "delta_sq"):
        with np.errstate(all="ignore"):
            error = np.sqrt(batch.sums["delta_sq"] / batch.sums["base_sq"])
        for tensor, part in zip(batch.tensors, np.split(error, batch.starts[1:]), strict=True):
            if not np.any(part != 0):  # plain numbers on both sides
                continue
            known, name = np.where(np.isfinite(part), part, -1.0), tensor.info.name
            most = np.argsort(-known, kind="stable")[:MOST_SHOWN]
            worst += [(-float(known[n]), len(weights), name, int(n)) for n in most if known[n] >= 0]
            worst = sorted(worst)[:MOST_SHOWN]
            finite = part[np.isfinite(part)]
            middle, top = (float(np.median(finite)), float(finite.max())) if len(finite) else (np.nan, np.nan)
            weights.append((name, len(part), middle, top))
    if not weights:
        return ()
    places = locate_tensors(name for name, *_ in weights)
    rows = [(rank, -size, name, n, *places[name]) for rank, (size, _, name, n) in enumerate(worst, 1)]
    by_weight = [(*places[name], count, middle, top) for name, count, middle, top in weights]
    by_weight.sort(key=lambda row: text.natural_key(f"{row[0]} {row[1]}"))
    return (
        ReportFigure.of("quantization", suffix, rows, shown=MOST_SHOWN),
        ReportFigure.of("quantization-by-weight", suffix, by_weight),
    )
