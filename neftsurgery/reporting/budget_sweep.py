"""What budgets of increasing size choose, and how much of the whole change they capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import text
from ..progress import Progress
from ..scoring.scores import Scores
from ..selection.budget import Amount, Budget
from ..selection.selection import Selection
from .figure import Column, ReportFigure, Table
from .layer_map import LayerMap
from .plotting import ACCENT, MUTED, MplFigure, annotate, heatmap, legend_above, new_axes

__all__ = ["PERCENTS", "BudgetPoint", "BudgetSweep"]

#: The budgets, in percent of the scored neurons.
PERCENTS = ("0.5", "1", "2", "3", "5", "7.5", "10", "15", "20")
_KINDS = 14
_CHOSEN_SHARE = "share of the scored neurons chosen"


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """What one budget chooses."""

    budget: str  # the budget as text: ``3%``
    # How many neurons it chooses, and how many parameters they hold.
    neurons: int
    parameters: int
    share: float  # the chosen share of the scored neurons
    # The captured share of the squared change: of all common tensors, and of the scored ones. NaN if unknown.
    captured: float
    captured_scored: float
    kinds: dict[str, tuple[int, int]]  # for each kind of weight, its chosen neurons and all its neurons

    @classmethod
    def of(cls, budget: str, scores: Scores, selection: Selection) -> BudgetPoint:
        """The point of a budget, given what it chooses."""
        found = LayerMap.of_scores(scores, selection)
        chosen, totals = found.chosen.sum(axis=0).tolist(), found.totals.sum(axis=0).tolist()
        return cls(
            budget,
            selection.neurons,
            selection.parameters,
            selection.neurons / scores.neurons,
            np.nan if selection.facts.captured is None else selection.facts.captured,
            np.nan if selection.facts.captured_scored is None else selection.facts.captured_scored,
            dict(zip(found.kinds, zip(chosen, totals, strict=True), strict=True)),
        )


@dataclass(frozen=True, slots=True)
class BudgetSweep:
    """What budgets from 0.5% to 20% choose, with the policy and the pools of a given budget."""

    points: tuple[BudgetPoint, ...]

    @classmethod
    def of(cls, scores: Scores, budget: Budget, progress: Progress) -> BudgetSweep:
        """Choose once with each budget of `PERCENTS`."""
        points = []
        with progress("computing", len(PERCENTS)) as advance:
            for percent in PERCENTS:
                bare = Budget(
                    Amount.parse(f"{percent}%"), per=budget.per, max_per_tensor=budget.max_per_tensor,
                    policy=budget.policy, seed=budget.seed,
                )  # fmt: skip
                points.append(BudgetPoint.of(f"{percent}%", scores, scores.choose(bare)))
                advance(1)
        return cls(tuple(points))

    def captured_figure(self, id: str = "growth") -> ReportFigure:
        """The captured share of the change, by budget."""
        columns = (
            Column("budget", "budget"),
            Column("neurons", "neurons", text.commas),
            Column("parameters", "parameters", text.commas),
            Column("share", "share of the scored neurons", text.percent),
            Column("captured", "share of the whole change", text.percent, bar=True),
            Column("captured_scored", "share of the scored tensors' change", text.percent),
        )
        rows = tuple(
            (p.budget, p.neurons, p.parameters, p.share, p.captured, p.captured_scored) for p in self.points
        )
        known = any(point.captured == point.captured for point in self.points)
        return ReportFigure(
            id,
            "Captured change by budget",
            "percent of the squared change of all common tensors, by percent of the scored neurons",
            "The further the line is above the dashed line, the more of the change is in few neurons. The "
            "dashed line shows the case in which all neurons change equally and every choice is as good as "
            "any other.",
            Table(columns, rows),
            self._draw_captured if known else None,
            self._verdict(),
        )

    def _verdict(self) -> str:
        known = [point for point in self.points if point.captured == point.captured]
        if not known:
            return "The scores file does not say how much each neuron changed."
        return (
            f"{known[0].budget} of the neurons hold {text.percent(known[0].captured)} of the change; "
            f"{known[-1].budget} hold {text.percent(known[-1].captured)}."
        )

    def _draw_captured(self, fig: MplFigure) -> None:
        labels = {"xlabel": _CHOSEN_SHARE, "ylabel": "share of the change captured"}
        axes = new_axes(fig, 2.9, grid="y", **labels)
        xs = np.arange(len(self.points))
        captured = 100 * np.array([point.captured for point in self.points])
        equal = 100 * np.array([point.share for point in self.points])
        axes.plot(
            xs, captured, color=ACCENT, marker="o", markersize=5, linewidth=1.8, label="the chosen neurons"
        )
        axes.plot(xs, equal, color=MUTED, linestyle=(0, (4, 2)), linewidth=1, label="if all changed equally")
        for x, y in zip(xs, captured, strict=True):
            annotate(axes, text.percent(y / 100), (x, y), (-7, 6), ha="center", color=ACCENT)
        axes.set_xticks(xs, [point.budget for point in self.points])
        top = max(1.0, 1.16 * float(np.nanmax(captured)), 1.16 * float(equal.max()))
        axes.set(xlim=(-0.6, len(xs) - 0.6), ylim=(0, top))
        axes.yaxis.set_major_formatter("{x:g}%")
        legend_above(axes)

    def kinds_figure(self, id: str = "growth-by-kind") -> ReportFigure:
        """The chosen share of each kind of weight, by budget."""
        columns = (
            Column("budget", "budget"),
            Column("kind", "kind of weight", text.label),
            Column("chosen", "chosen", text.commas),
            Column("total", "neurons", text.commas),
            Column("share", "share", text.percent, bar=True),
        )
        rows = tuple(
            (point.budget, kind, chosen, total, chosen / total)
            for point in self.points
            for kind, (chosen, total) in point.kinds.items()
            if total
        )
        return ReportFigure(
            id,
            "Chosen kinds of weight by budget",
            "percent of the neurons of that kind",
            "Each row is a kind of weight, each column a budget. A row that is lighter than the others from "
            "the left is chosen first. If all rows lighten equally, the kind of weight does not matter.",
            Table(columns, rows),
            self._draw_kinds,
        )

    def _draw_kinds(self, fig: MplFigure) -> None:
        kinds = _largest(self.points)
        share = np.array(
            [[p.kinds[kind][0] / max(1, p.kinds[kind][1]) for p in self.points] for kind in kinds]
        )
        axes = new_axes(fig, 0.6 + 0.24 * len(kinds), xlabel=_CHOSEN_SHARE)
        rows, columns = [text.label(kind, 28) for kind in kinds], [point.budget for point in self.points]
        heatmap(axes, share, rows, columns, top=float(share.max()) or 1.0, slanted=False, gaps=False)
        axes.xaxis.tick_bottom()


def _largest(points: Sequence[BudgetPoint]) -> list[str]:
    """The kinds to draw: those with the most chosen neurons, in their original order."""
    kinds = list(points[-1].kinds)
    most = sorted(kinds, key=lambda kind: -points[-1].kinds[kind][0])[:_KINDS]
    return [kind for kind in kinds if kind in most]
