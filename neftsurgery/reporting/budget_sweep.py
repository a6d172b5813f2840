"""What budgets of increasing size choose, and how much of the whole change they capture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import text
from ..progress import Progress
from ..scoring.scores import Scores
from ..selection.budget import Amount, Budget
from .figure import KIND, SHARE, Column, ReportFigure, Table
from .layer_map import LayerMap
from .plotting import ACCENT, MplFigure, annotate, heatmap, share_curves

#: The budgets, in percent of the scored neurons.
PERCENTS = ("0.5", "1", "2", "3", "5", "7.5", "10", "15", "20")
_KINDS = 14
_CHOSEN_SHARE = "share of the scored neurons chosen"


class _Point(NamedTuple):
    """What one budget chooses: a row of the table."""

    budget: str  # as text: ``3%``
    neurons: int
    parameters: int
    share: float  # of the scored neurons
    captured: float  # the share of the squared change of all common tensors; NaN if unknown
    captured_scored: float


class BudgetSweep:
    """What budgets from 0.5% to 20% choose, with the policy and the pools of a given budget."""

    def __init__(self, scores: Scores, budget: Budget, progress: Progress) -> None:
        self._points = list[_Point]()
        self._kinds = list[dict[str, tuple[int, int]]]()  # chosen and all neurons of each kind, by budget
        with progress("computing", len(PERCENTS)) as advance:
            for percent in PERCENTS:
                bare = Budget(
                    Amount.parse(f"{percent}%"), per=budget.per, max_per_tensor=budget.max_per_tensor,
                    policy=budget.policy, seed=budget.seed,
                )  # fmt: skip
                chosen = None  # before the next, which may be large
                chosen = scores.choose(bare)
                shares = chosen.neurons / scores.neurons, chosen.facts.captured, chosen.facts.captured_scored
                known = [np.nan if one is None else one for one in shares]
                self._points.append(_Point(f"{percent}%", chosen.neurons, chosen.parameters, *known))
                self._kinds.append(LayerMap.of_scores(scores, chosen).by_kind)
                advance(1)

    def captured_figure(self, id: str) -> ReportFigure:
        """The captured share of the change, by budget."""
        columns = (
            Column("budget", "budget"),
            Column("neurons", "neurons", text.commas),
            Column("parameters", "parameters", text.commas),
            Column("share", "share of the scored neurons", text.percent),
            Column("captured", "share of the whole change", text.percent, bar=True),
            Column("captured_scored", "share of the scored tensors' change", text.percent),
        )
        known = [point for point in self._points if point.captured == point.captured]
        return ReportFigure(
            id,
            "Captured change by budget",
            "percent of the squared change of all common tensors, by percent of the scored neurons",
            "The further the line is above the dashed line, the more of the change is in few neurons. The "
            "dashed line shows the case in which all neurons change equally and every choice is as good as "
            "any other.",
            Table(columns, tuple(self._points)),
            self._draw_captured if known else None,
            f"{known[0].budget} of the neurons hold {text.percent(known[0].captured)} of the change; "
            f"{known[-1].budget} hold {text.percent(known[-1].captured)}."
            if known
            else "The scores file does not say how much each neuron changed.",
        )

    def _draw_captured(self, fig: MplFigure) -> None:
        captured = 100 * np.array([point.captured for point in self._points])
        equal = 100 * np.array([point.share for point in self._points])
        axes = share_curves(
            fig, 2.9, [point.budget for point in self._points],
            [("the chosen neurons", captured, "o", ACCENT)], ("if all changed equally", equal),
            xlabel=_CHOSEN_SHARE, ylabel="share of the change captured",
        )  # fmt: skip
        for x, y in enumerate(captured):
            annotate(axes, text.percent(y / 100), (x, y), (-7, 6), ha="center", color=ACCENT)
        axes.set_ylim(0, max(1.0, 1.16 * float(np.nanmax(captured)), 1.16 * float(equal.max())))

    def kinds_figure(self, id: str) -> ReportFigure:
        """The chosen share of each kind of weight, by budget."""
        columns = (
            Column("budget", "budget"),
            KIND,
            Column("chosen", "chosen", text.commas),
            Column("total", "neurons", text.commas),
            SHARE,
        )
        rows = tuple(
            (point.budget, kind, chosen, total, chosen / total)
            for point, kinds in zip(self._points, self._kinds, strict=True)
            for kind, (chosen, total) in kinds.items()
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
        last = self._kinds[-1]  # those with the most chosen neurons are drawn, in their order
        most = sorted(last, key=lambda kind: -last[kind][0])[:_KINDS]
        kinds = [kind for kind in last if kind in most]
        share = np.array([[each[kind][0] / max(1, each[kind][1]) for each in self._kinds] for kind in kinds])
        rows, columns = [text.label(kind, 28) for kind in kinds], [point.budget for point in self._points]
        mesh = heatmap(fig, share, rows, columns, xlabel=_CHOSEN_SHARE)
        mesh.axes.xaxis.tick_bottom()
