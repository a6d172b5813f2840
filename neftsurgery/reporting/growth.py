"""How a choice grows with its budget, and what share of the whole change it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import text
from ..scoring.scores import Scores
from ..selection.budget import Amount, Budget
from ..selection.selection import Selection
from .drawing import ACCENT, MUTED, SCALE, WIDTH, Canvas, legend_above, quiet
from .figure import Column, Figure, Table
from .layer_map import LayerMap
from .map_figure import number_cells

__all__ = ["PERCENTS", "Growth", "Point"]

#: The budgets, in percent of the scored neurons.
PERCENTS = ("0.5", "1", "2", "3", "5", "7.5", "10", "15", "20")
_KINDS = 14


@dataclass(frozen=True, slots=True)
class Point:
    """What a budget chooses.

    Attributes
    ----------
    budget:
        As it is written: ``3%``.
    neurons, parameters:
        How many are chosen.
    share:
        Of the neurons that are scored.
    captured, captured_scored:
        Share of the squared change of all common tensors, and of the scored ones; NaN where not known.
    kinds:
        Per kind of weight its neurons, chosen and in all.
    """

    budget: str
    neurons: int
    parameters: int
    share: float
    captured: float
    captured_scored: float
    kinds: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, budget: str, scores: Scores, selection: Selection) -> Point:
        """What a selection holds."""
        found = LayerMap.of_scores(scores, selection)
        taken, there = found.chosen.sum(axis=0).tolist(), found.totals.sum(axis=0).tolist()
        return cls(
            budget,
            selection.neurons,
            selection.parameters,
            selection.neurons / scores.neurons,
            float(selection.facts.get("captured", np.nan)),
            float(selection.facts.get("captured_scored", np.nan)),
            dict(zip(found.kinds, zip(taken, there, strict=True), strict=True)),
        )


@dataclass(frozen=True, slots=True)
class Growth:
    """What budgets from 0.5% to 20% choose, out of the pools and in the order of another budget."""

    points: tuple[Point, ...]

    @classmethod
    def of(cls, scores: Scores, budget: Budget, step: Callable[[int], object] = int) -> Growth:
        """Choose again and again; ``step`` is told of each time."""
        points = []
        for percent in PERCENTS:
            amount = Amount.parse(f"{percent}%")
            bare = replace(
                budget, neurons=amount, params=None, threshold=None, changed=False, like=None, with_bias=False
            )
            points.append(Point.of(f"{percent}%", scores, scores.choose(bare)))
            step(1)
        return cls(tuple(points))

    def captured_figure(self, id: str = "growth") -> Figure:
        """The share of the change over the share of the neurons."""
        columns = (
            Column("budget", "budget"),
            Column("neurons", "neurons", text.amount),
            Column("parameters", "parameters", text.amount),
            Column("share", "share of the scored neurons", text.percent),
            Column("captured", "share of the whole change", text.percent, bar=True),
            Column("captured_scored", "share of the scored tensors' change", text.percent),
        )
        rows = tuple(
            (p.budget, p.neurons, p.parameters, p.share, p.captured, p.captured_scored) for p in self.points
        )
        known = any(point.captured == point.captured for point in self.points)
        return Figure(
            id,
            "What the choice captures as it grows",
            "percent of the squared change of all common tensors, over percent of the scored neurons",
            "The higher the line is above the dashed one, the more of the change lies in few neurons. The "
            "dashed line is what neurons would hold that all changed alike: then any choice is as good.",
            Table(columns, rows),
            self._draw_captured if known else None,
            self._verdict(),
        )

    def _verdict(self) -> str:
        known = [point for point in self.points if point.captured == point.captured]
        if not known:
            return "These scores do not tell how much each neuron changed."
        return (
            f"{known[0].budget} of the neurons hold {text.percent(known[0].captured)} of the change, "
            f"{known[-1].budget} hold {text.percent(known[-1].captured)}."
        )

    def _draw_captured(self, canvas: Canvas) -> None:
        canvas.set_size_inches(WIDTH, 2.9)
        axes = canvas.add_subplot()
        place = np.arange(len(self.points))
        captured = 100 * np.array([point.captured for point in self.points])
        alike = 100 * np.array([point.share for point in self.points])
        axes.plot(
            place, captured, color=ACCENT, marker="o", markersize=5, linewidth=1.8, label="the chosen neurons"
        )
        axes.plot(place, alike, color=MUTED, linestyle=(0, (4, 2)), linewidth=1, label="if all changed alike")
        for x, y in zip(place, captured, strict=True):
            axes.annotate(
                text.percent(y / 100), (x, y), (-7, 6), textcoords="offset points", ha="center", color=ACCENT
            )
        axes.set_xticks(place, [point.budget for point in self.points])
        axes.set_ylim(0, max(1.0, 1.16 * float(np.nanmax(captured)), 1.16 * float(alike.max())))
        axes.set_xlim(-0.6, len(place) - 0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel("of the scored neurons are chosen")
        axes.set_ylabel("of the change is in them")
        legend_above(axes)
        quiet(axes, grid="y")

    def kinds_figure(self, id: str = "growth-by-kind") -> Figure:
        """The share of each kind's neurons that is chosen, over the budget."""
        columns = (
            Column("budget", "budget"),
            Column("kind", "kind of weight", text.label),
            Column("chosen", "chosen", text.amount),
            Column("total", "neurons", text.amount),
            Column("share", "share", text.percent, bar=True),
        )
        rows = tuple(
            (point.budget, kind, taken, there, taken / there)
            for point in self.points
            for kind, (taken, there) in point.kinds.items()
            if there
        )
        return Figure(
            id,
            "Which kinds of weight the choice takes as it grows",
            "percent of the neurons of that kind",
            "A row is a kind of weight, a column a budget. A row that is lighter than the others from the "
            "left on is where the choice begins; where all grow alike, the kind of weight does not matter.",
            Table(columns, rows),
            self._draw_kinds,
        )

    def _draw_kinds(self, canvas: Canvas) -> None:
        kinds = _largest(self.points)
        share = np.array(
            [[p.kinds[kind][0] / max(1, p.kinds[kind][1]) for p in self.points] for kind in kinds]
        )
        canvas.set_size_inches(WIDTH, 0.6 + 0.24 * len(kinds))
        axes = canvas.add_subplot()
        top = float(share.max()) or 1.0
        axes.pcolormesh(share, cmap=SCALE, vmin=0, vmax=top)
        number_cells(axes, share, top)
        axes.set_ylim(len(kinds), 0)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, [text.label(kind, 28) for kind in kinds])
        axes.set_xticks(np.arange(len(self.points)) + 0.5, [point.budget for point in self.points])
        axes.set_xlabel("of the scored neurons are chosen")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)


def _largest(points: Sequence[Point]) -> list[str]:
    """The kinds to draw: those with the most neurons chosen, in their own order."""
    kinds = list(points[-1].kinds)
    most = sorted(kinds, key=lambda kind: -points[-1].kinds[kind][0])[:_KINDS]
    return [kind for kind in kinds if kind in most]
