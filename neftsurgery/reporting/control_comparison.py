"""Does "sensitive" mean more than "small"? A score compared with the controls ``norm`` and ``random``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .. import text
from ..tensors.arrays import Float64Array, Int64Array
from .budget_sweep import PERCENTS
from .figure import ReportFigure
from .inputs import Candidates
from .plotting import ACCENT, CONTRAST, INK, MUTED, MplFigure, annotate, legend_above, new_axes, share_curves

_LARGEST = float(np.finfo(np.float32).max)
_KINDS = 12
#: Limits of the verdict. They apply to the larger of two numbers: the rank correlation with the norm, and the
#: overlap with the norm's choice, scaled so that chance is 0 and a complete overlap is 1.
_SAME, _PARTLY = 0.7, 0.35
_MARKS = {"norm": ("s", CONTRAST), "random": ("o", ACCENT)}


@dataclass(frozen=True, slots=True)
class _Control:
    """A score compared with one control."""

    name: str  # ``norm`` or ``random``
    correlation: float  # Spearman's, over all candidates; NaN if one of the two is constant
    by_kind: tuple[float, ...]  # the same within each kind of weight
    overlaps: Int64Array  # for each budget, how many candidates both choose
    chosen: int  # how many of the chosen candidates the control also chooses with the same budget


class ControlComparison:
    """A score of candidates compared with its controls: ``norm``, if the norms are known, and ``random``."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates, self._word, count = candidates, candidates.word, len(candidates)
        # How many each budget of `PERCENTS` chooses from one pool, rounded as a budget rounds a percentage.
        self._taken = np.array(
            [max(1, int(Fraction(p) * count / 100 + Fraction(1, 2))) for p in PERCENTS], np.int64
        )
        mine, rank = candidates.score.astype(np.float64), _positions(candidates.order)
        self._sizes = np.bincount(candidates.kind, minlength=len(candidates.kinds))
        # The candidates of each kind, from one sort instead of one pass for each kind.
        parts = np.split(np.argsort(candidates.kind, kind="stable"), np.cumsum(self._sizes)[:-1])
        self._chosen = int(candidates.chosen.sum())
        self._controls = []
        for name, values in _controls(candidates):
            other = _positions(np.argsort(-values, kind="stable"))
            both = np.cumsum(np.bincount(np.maximum(rank, other), minlength=count))
            by_kind = tuple(spearman(mine[part], values[part]) for part in parts)
            shared = int((candidates.chosen & (other < self._chosen)).sum())
            overlaps, all_kinds = both[self._taken - 1], spearman(mine, values)
            self._controls.append(_Control(name, all_kinds, by_kind, overlaps, shared))

    @property
    def verdict(self) -> str:
        """One or two sentences: whether "sensitive" means more than "small"."""
        norm = next((control for control in self._controls if control.name == "norm"), None)
        score = self._candidates.score_name
        if score in ("norm", "random"):
            return f"This score is the control {score} itself."
        if norm is None:
            return "The scores file does not hold the norms, so the control norm is missing."
        overlap, chance = norm.chosen / self._chosen, self._chosen / len(self._candidates)
        excess = (overlap - chance) / (1 - chance) if chance < 1 else 0.0
        strength = max(excess, norm.correlation) if norm.correlation == norm.correlation else excess
        if strength >= _SAME:
            means = 'means little more than "small"'
        elif strength >= _PARTLY:
            means = 'partly means "small"'
        else:
            means = 'mostly means "large"' if norm.correlation <= -_SAME else 'means more than "small"'
        chosen = text.commas(self._chosen * self._candidates.step)
        return (
            f'Here "sensitive" {means}: the rank correlation with smallness is '
            f"{text.correlation(norm.correlation)}, and {text.percent(overlap)} of the chosen {self._word}s "
            f"are among the {chosen} smallest (by chance: {text.percent(chance)})."
        )

    def overlap_figure(self, suffix: str) -> ReportFigure:
        """The share of the chosen candidates that the controls also choose, by budget."""
        count = len(self._candidates)
        rows = (
            (f"{percent}%", control.name, k, shared, shared / k, shared / (2 * k - shared), k / count)
            for control in self._controls
            for percent, k, shared in zip(
                PERCENTS, self._taken.tolist(), control.overlaps.tolist(), strict=True
            )
        )
        draw, verdict, note = self._draw_overlaps, self.verdict, self._candidates.note
        return ReportFigure.of("agreement", suffix, rows, draw, verdict, word=self._word, note=note)

    def _draw_overlaps(self, fig: MplFigure) -> None:
        chance = 100 * self._taken / len(self._candidates)
        curves = [(one.name, 100 * one.overlaps / self._taken, *_MARKS[one.name]) for one in self._controls]
        axes = share_curves(
            fig, 2.7, [f"{percent}%" for percent in PERCENTS], curves, ("chance", chance),
            xlabel=f"share of the {self._word}s chosen", ylabel="also chosen by the control",
        )  # fmt: skip
        axes.set_ylim(0, min(105, 1.2 * max(values.max() for values in [chance, *(c[1] for c in curves)])))

    def correlation_figure(self, suffix: str) -> ReportFigure:
        """The rank correlation with each control: overall, and by kind of weight."""
        rows = [("all", c.name, len(self._candidates), c.correlation) for c in self._controls]
        for number, kind in enumerate(self._candidates.kinds):
            rows += [(kind, c.name, int(self._sizes[number]), c.by_kind[number]) for c in self._controls]
        words = {"word": self._word, "note": self._candidates.note}
        return ReportFigure.of("correlation", suffix, rows, self._draw_correlations, **words)

    def _draw_correlations(self, fig: MplFigure) -> None:
        shown = np.sort(np.argsort(-self._sizes, kind="stable")[:_KINDS])
        height = 0.65 + 0.27 * (len(shown) + 1)
        axes = new_axes(fig, height, grid="both", xlabel="rank correlation with the control")
        names = ["all", *(text.label(self._candidates.kinds[kind], 28) for kind in shown)]
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for control in self._controls:
            mark, colour = _MARKS[control.name]
            values = [control.correlation, *(control.by_kind[kind] for kind in shown)]
            axes.plot(values, range(len(values)), mark, color=colour, markersize=5.5, label=control.name)
            for row, value in enumerate(values):
                if control.name == "norm" and value == value:
                    side = 1 if value >= 0 else -1
                    style = {"ha": "left" if side > 0 else "right", "va": "center", "color": INK}
                    annotate(axes, text.correlation(value), (value, row), (8 * side, 0), **style)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(-1.15, 1.15), ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], [text.correlation(tick) for tick in (-1, -0.5, 0, 0.5, 1)])
        legend_above(axes)


def spearman(one: Float64Array, other: Float64Array) -> float:
    """Spearman's rank correlation of two vectors. Ties get their mean rank. NaN if one vector is constant."""
    if len(one) < 2:
        return np.nan
    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    size = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / size if size > 0 else np.nan


def _ranks(values: Float64Array) -> Float64Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: Float64Array = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return mean


def _positions(order: Int64Array) -> Int64Array:
    """The position of each candidate in ``order``."""
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    return positions


def _controls(candidates: Candidates) -> Iterator[tuple[str, Float64Array]]:
    """The candidates' scores under each control, by the definitions of `neftsurgery.diff`."""
    from ..scoring.sums import random_scores  # imports numba

    if candidates.base_sq is not None:
        with np.errstate(divide="ignore"):
            norm = np.minimum(1 / np.sqrt(candidates.base_sq), _LARGEST)
        yield "norm", norm.astype(np.float32).astype(np.float64)
    starts = np.searchsorted(candidates.tensor, np.arange(1, len(candidates.tensors)))
    own = zip(candidates.tensors, np.split(candidates.index, starts), strict=True)
    drawn = [random_scores(name, int(mine.max(initial=-1)) + 1, 0)[mine] for name, mine in own]
    yield "random", np.concatenate(drawn).astype(np.float64)
