"""How the scores are distributed, per kind of weight, and where the budget cuts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import text
from .drawing import ACCENT, CONTRAST, FAINT, INK, MUTED, WIDTH, Canvas, log_ticks, quiet
from .figure import Column, Figure, Table
from .subjects import Items

__all__ = ["Distribution"]

_BINS = 72
_KINDS = 12
#: A score whose largest value is this many times its median is shown on a logarithmic axis.
_SKEWED = 8.0

I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Distribution:
    """Histograms of a score.

    Attributes
    ----------
    score, word:
        Which score, of what: ``neuron`` or ``unit``.
    log:
        Whether the bins are even in the score's logarithm.
    edges:
        Float64 ``[bins + 1]``: the edges, of the score itself. The last bin has both its edges.
    kinds:
        The kinds of weight.
    counts, chosen:
        Int64 ``[kinds, bins]``: items in each bin, and chosen ones.
    below:
        Int64 ``[kinds]``: items of 0, which have no place on a logarithmic axis.
    cut:
        The lowest score that is chosen, where the most sensitive of one pool are; None otherwise.
    """

    score: str
    word: str
    log: bool
    edges: NDArray[np.float64]
    kinds: tuple[str, ...]
    counts: I64
    chosen: I64
    below: I64
    cut: float | None

    @classmethod
    def of(cls, items: Items, score: str, *, one_cut: bool) -> Distribution:
        """The distribution of ``items``; ``one_cut``: a single score parts the chosen from the rest."""
        values = np.clip(items.score.astype(np.float64), -1e300, 1e300)
        log = _is_skewed(values)
        shown = values > 0 if log else np.ones(len(values), np.bool_)
        edges = _edges(values[shown], log)
        where = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
        size = len(items.kinds), _BINS

        def histogram(mask: NDArray[np.bool_]) -> I64:
            flat = np.bincount(items.kind[mask] * _BINS + where[mask], minlength=size[0] * size[1])
            return flat.reshape(size)

        cut = float(items.score[items.chosen].min()) if one_cut and items.chosen.any() else None
        return cls(
            score,
            items.word,
            log,
            edges,
            items.kinds,
            histogram(shown),
            histogram(shown & items.chosen),
            np.bincount(items.kind[~shown], minlength=size[0]),
            cut,
        )

    def figure(self, id: str = "distribution") -> Figure:
        """The histograms as a figure."""
        columns = (
            Column("kind", "kind of weight", text.label),
            Column("from", f"{self.score} from", text.number),
            Column("to", "to", text.number),
            Column("count", f"{self.word}s", text.amount),
            Column("chosen", "chosen", text.amount),
        )
        rows: list[tuple[str, float, float, int, int]] = []
        for number, kind in enumerate(self.kinds):
            if self.below[number]:
                rows.append((kind, 0.0, 0.0, int(self.below[number]), 0))
            for place in np.flatnonzero(self.counts[number]):
                low, high = float(self.edges[place]), float(self.edges[place + 1])
                rows.append(
                    (kind, low, high, int(self.counts[number, place]), int(self.chosen[number, place]))
                )
        scale = "logarithmic axis" if self.log else "linear axis"
        return Figure(
            id,
            "How the scores are distributed",
            f"{self.score} score of a {self.word}, {scale}; height: square root of the share",
            f"One hill a kind of weight: the further right, the more sensitive its {self.word}s. The dark "
            "part is chosen; its share of the kind stands on the right."
            + (" The dashed line is the cut, the lowest score that the budget takes." if self.cut else "")
            + (
                " A score of 0 has no place on the axis; the share of such stands on the left."
                if self._any_below
                else ""
            ),
            Table(columns, tuple(rows)),
            self._draw,
        )

    @property
    def _any_below(self) -> bool:
        return bool(self.below.any())

    def _draw(self, canvas: Canvas) -> None:
        shown = np.argsort(-self.chosen.sum(axis=1), kind="stable")[:_KINDS]
        shown = np.sort(shown)
        canvas.set_size_inches(WIDTH, 0.75 + 0.46 * len(shown))
        axes = canvas.add_subplot()
        edges = np.log10(self.edges) if self.log else self.edges
        whole = np.maximum(self.counts.sum(axis=1) + self.below, 1)
        # Few neurons are chosen: the root keeps them visible.
        height = np.sqrt(self.counts / whole[:, None])
        scale = 0.86 / max(float(height.max()), 1e-9)
        for row, kind in enumerate(shown[::-1]):
            for values, colour in ((self.counts, FAINT), (self.chosen, ACCENT)):
                top = row + scale * np.sqrt(values[kind] / whole[kind])
                axes.stairs(top, edges, baseline=row, fill=True, color=colour, linewidth=0)
            axes.plot(edges[[0, -1]], [row, row], color=MUTED, linewidth=0.5)
            share = text.percent(self.chosen[kind].sum() / whole[kind])
            axes.annotate(
                share,
                (1, row),
                (4, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=INK,
                annotation_clip=False,
            )
            if self.below[kind]:
                axes.annotate(
                    f"{text.percent(self.below[kind] / whole[kind])} at 0",
                    (0, row),
                    (3, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    color=MUTED,
                    fontsize=7,
                )
        if self.cut is not None and (self.cut > 0 or not self.log):
            at = np.log10(self.cut) if self.log else self.cut
            axes.axvline(at, color=CONTRAST, linestyle=(0, (4, 2)), linewidth=1.2)
            axes.annotate(
                f"cut {text.number(self.cut)}",
                (at, len(shown)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=CONTRAST,
                annotation_clip=False,
            )
        axes.set_yticks(np.arange(len(shown)) + 0.12, [text.label(self.kinds[k], 28) for k in shown[::-1]])
        axes.set_ylim(-0.05, len(shown))
        axes.set_xlim(edges[0], edges[-1])
        if self.log:
            axes.set_xticks(*log_ticks(float(edges[0]), float(edges[-1])))
        axes.set_xlabel(f"{self.score} score")
        quiet(axes, grid="x")


def _is_skewed(values: NDArray[np.float64]) -> bool:
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return False
    return bool(positive.max() > _SKEWED * np.median(positive))


def _edges(values: NDArray[np.float64], log: bool) -> NDArray[np.float64]:
    """Even bins from the lowest to the highest value."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if log:
        edges = np.logspace(np.log10(low), np.log10(high), _BINS + 1) if low < high else None
    else:
        edges = np.linspace(low, high, _BINS + 1) if low < high else None
    if edges is None or not (np.diff(edges) > 0).all():
        half = abs(low) / 2 or 0.5
        return np.linspace(low - half, low + half, _BINS + 1)
    edges[0], edges[-1] = low, high  # whatever rounding made of them
    return edges
