"""What budgets of increasing size choose, and how much of the whole change they capture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import text
from ..progress import Progress
from ..scoring.scores import Scores
from ..selection.budget import Amount, Budget
from .figure import ReportFigure
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

    def captured_figure(self, suffix: str) -> ReportFigure:
        """The captured share of the change, by budget."""
        known = [point for point in self._points if point.captured == point.captured]
        if not known:
            unknown = "The scores file does not say how much each neuron changed."
            return ReportFigure.of("growth", suffix, self._points, None, unknown)
        verdict = (
            f"{known[0].budget} of the neurons hold {text.percent(known[0].captured)} of the change; "
            f"{known[-1].budget} hold {text.percent(known[-1].captured)}."
        )
        return ReportFigure.of("growth", suffix, self._points, self._draw_captured, verdict)

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

    def kinds_figure(self, suffix: str) -> ReportFigure:
        """The chosen share of each kind of weight, by budget."""
        rows = (
            (point.budget, kind, chosen, total, chosen / total)
            for point, kinds in zip(self._points, self._kinds, strict=True)
            for kind, (chosen, total) in kinds.items()
            if total
        )
        return ReportFigure.of("growth-by-kind", suffix, rows, self._draw_kinds)

    def _draw_kinds(self, fig: MplFigure) -> None:
        last = self._kinds[-1]  # those with the most chosen neurons are drawn, in their order
        most = sorted(last, key=lambda kind: -last[kind][0])[:_KINDS]
        kinds = [kind for kind in last if kind in most]
        share = np.array([[each[kind][0] / max(1, each[kind][1]) for each in self._kinds] for kind in kinds])
        rows, columns = [text.label(kind, 28) for kind in kinds], [point.budget for point in self._points]
        mesh = heatmap(fig, share, rows, columns, xlabel=_CHOSEN_SHARE)
        mesh.axes.xaxis.tick_bottom()
