"""Does "sensitive" mean more than "small"? A score compared with the controls ``norm`` and ``random``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .. import text
from ..tensors.arrays import Float64Array, Int64Array
from .budget_sweep import PERCENTS
from .figure import Column, ReportFigure, Table
from .inputs import Candidates
from .plotting import ACCENT, CONTRAST, INK, MUTED, MplFigure, annotate, legend_above, new_axes

__all__ = ["Control", "ControlComparison", "spearman"]

_LARGEST = float(np.finfo(np.float32).max)
_KINDS = 12
#: Limits of the verdict. They apply to the larger of two numbers: the rank correlation with the norm, and the
#: overlap with the norm's choice, scaled so that chance is 0 and a complete overlap is 1.
_SAME, _PARTLY = 0.7, 0.35
_MARKS = {"norm": ("s", CONTRAST), "random": ("o", ACCENT)}


@dataclass(frozen=True, slots=True)
class Control:
    """A score compared with one control."""

    name: str  # ``norm`` or ``random``
    # Spearman's rank correlation over all candidates. NaN if one of the two is constant.
    correlation: float
    by_kind: tuple[float, ...]  # the same within each kind of weight
    overlaps: tuple[int, ...]  # for each budget, how many candidates both choose
    chosen: int  # how many of the chosen candidates the control also chooses with the same budget


@dataclass(frozen=True, slots=True)
class ControlComparison:
    """A score compared with its controls."""

    # The name of the score, and what it scores: ``neuron`` or ``unit``.
    score: str
    word: str
    # How many candidates have a score, and how many of them are chosen.
    count: int
    chosen: int
    # The kinds of weight, and the number of candidates of each.
    kinds: tuple[str, ...]
    sizes: tuple[int, ...]
    taken: tuple[int, ...]  # for each budget in `PERCENTS`, how many candidates it chooses from one pool
    controls: tuple[Control, ...]  # ``norm``, if the scores file holds the norms, and ``random``

    @classmethod
    def of(cls, candidates: Candidates, score: str) -> ControlComparison:
        """Compare the candidates' scores with the controls."""
        count = len(candidates)
        # Rounded as a budget rounds a percentage.
        taken = tuple(max(1, int(Fraction(p) * count / 100 + Fraction(1, 2))) for p in PERCENTS)
        mine = candidates.score.astype(np.float64)
        rank = _positions(candidates.order)
        # The candidates of each kind, from one sort instead of one pass for each kind.
        edges = np.cumsum(np.bincount(candidates.kind, minlength=len(candidates.kinds)))[:-1]
        parts = np.split(np.argsort(candidates.kind, kind="stable"), edges)
        chosen = int(candidates.chosen.sum())
        found = []
        for name, values in _controls(candidates):
            other = _positions(np.argsort(-values, kind="stable"))
            both = np.cumsum(np.bincount(np.maximum(rank, other), minlength=count))
            by_kind = tuple(spearman(mine[part], values[part]) for part in parts)
            overlaps = tuple(int(both[k - 1]) for k in taken)
            shared = int((candidates.chosen & (other < chosen)).sum())
            found.append(Control(name, spearman(mine, values), by_kind, overlaps, shared))
        sizes = tuple(np.bincount(candidates.kind, minlength=len(candidates.kinds)).tolist())
        kinds, word = candidates.kinds, candidates.word
        return cls(score, word, count, chosen, kinds, sizes, taken, tuple(found))

    @property
    def verdict(self) -> str:
        """One or two sentences: whether "sensitive" means more than "small"."""
        norm = next((control for control in self.controls if control.name == "norm"), None)
        if self.score in ("norm", "random"):
            return f"This score is the control {self.score} itself."
        if norm is None:
            return "The scores file does not hold the norms, so the control norm is missing."
        overlap, chance = norm.chosen / self.chosen, self.chosen / self.count
        excess = (overlap - chance) / (1 - chance) if chance < 1 else 0.0
        facts = (
            f"the rank correlation with smallness is {text.correlation(norm.correlation)}, and "
            f"{text.percent(overlap)} of the chosen {self.word}s are among the {text.commas(self.chosen)} "
            f"smallest (by chance: {text.percent(chance)})"
        )
        strength = max(excess, norm.correlation) if norm.correlation == norm.correlation else excess
        if strength >= _SAME:
            return f'Here "sensitive" means little more than "small": {facts}.'
        if strength >= _PARTLY:
            return f'Here "sensitive" partly means "small": {facts}.'
        if norm.correlation <= -_SAME:
            return f'Here "sensitive" mostly means "large": {facts}.'
        return f'Here "sensitive" means more than "small": {facts}.'

    def overlap_figure(self, id: str = "agreement") -> ReportFigure:
        """The share of the chosen candidates that the controls also choose, by budget."""
        columns = (
            Column("budget", "budget"),
            Column("control", "control"),
            Column("chosen", f"{self.word}s chosen", text.commas),
            Column("shared", "chosen by both", text.commas),
            Column("overlap", "share", text.percent, bar=True),
            Column("jaccard", "Jaccard", text.percent),
            Column("chance", "by chance", text.percent),
        )
        rows = tuple(
            (f"{percent}%", control.name, k, shared, shared / k, shared / (2 * k - shared), k / self.count)
            for control in self.controls
            for percent, k, shared in zip(PERCENTS, self.taken, control.overlaps, strict=True)
        )
        return ReportFigure(
            id,
            'Does "sensitive" mean more than "small"?',
            f"percent of the most sensitive {self.word}s that a control also chooses, by budget",
            f"The control norm chooses the {self.word}s with the smallest vectors; the control random "
            "chooses at random. The dashed line is the overlap expected by chance. The closer a line is to "
            "100%, the more the score is the same as that control.",
            Table(columns, rows),
            self._draw_overlaps,
            self.verdict,
        )

    def _draw_overlaps(self, fig: MplFigure) -> None:
        labels = {"xlabel": f"share of the {self.word}s chosen", "ylabel": "also chosen by the control"}
        axes = new_axes(fig, 2.7, grid="y", **labels)
        xs = np.arange(len(PERCENTS))
        chance = 100 * np.array(self.taken) / self.count
        top = float(chance.max())
        for control in self.controls:
            mark, colour = _MARKS[control.name]
            share = 100 * np.array(control.overlaps) / np.array(self.taken)
            top = max(top, float(share.max()))
            axes.plot(xs, share, color=colour, marker=mark, markersize=5, linewidth=1.6, label=control.name)
        axes.plot(xs, chance, color=MUTED, linestyle=(0, (4, 2)), linewidth=1, label="chance")
        axes.set_xticks(xs, [f"{percent}%" for percent in PERCENTS])
        axes.set(xlim=(-0.4, len(xs) - 0.6), ylim=(0, min(105, 1.2 * top)))
        axes.yaxis.set_major_formatter("{x:g}%")
        legend_above(axes)

    def correlation_figure(self, id: str = "correlation") -> ReportFigure:
        """The rank correlation with each control: overall, and by kind of weight."""
        columns = (
            Column("kind", "kind of weight", text.label),
            Column("control", "control"),
            Column("count", f"{self.word}s", text.commas),
            Column("correlation", "rank correlation", text.four_digits),
        )
        rows = [("all", c.name, self.count, c.correlation) for c in self.controls]
        for number, kind in enumerate(self.kinds):
            rows += [(kind, c.name, self.sizes[number], c.by_kind[number]) for c in self.controls]
        return ReportFigure(
            id,
            "Rank correlation with the controls",
            "Spearman's rank correlation: 1 same order, 0 no relation, -1 reverse order",
            "Squares show the correlation with the control norm (small vectors first). Circles show the "
            f"control random, which is near 0. A square on the right means that the sensitive {self.word}s "
            "have small vectors; on the left, large vectors. A kind of weight can differ from the "
            "overall value, because its vectors differ in size.",
            Table(columns, tuple(rows)),
            self._draw_correlations,
        )

    def _draw_correlations(self, fig: MplFigure) -> None:
        shown = np.sort(np.argsort([-size for size in self.sizes], kind="stable")[:_KINDS])
        height = 0.65 + 0.27 * (len(shown) + 1)
        axes = new_axes(fig, height, grid="both", xlabel="rank correlation with the control")
        names = ["all", *(text.label(self.kinds[kind], 28) for kind in shown)]
        axes.axvline(0, color=MUTED, linewidth=0.8)
        for control in self.controls:
            mark, colour = _MARKS[control.name]
            values = [control.correlation, *(control.by_kind[kind] for kind in shown)]
            axes.plot(values, range(len(values)), mark, color=colour, markersize=5.5, label=control.name)
            if control.name == "norm":
                for row, value in enumerate(values):
                    if value == value:
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
    last = np.cumsum(counts)
    mean: Float64Array = (last - (counts - 1) / 2)[inverse]
    return mean


def _positions(order: Int64Array) -> Int64Array:
    """The position of each candidate in ``order``."""
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    return positions


def _controls(candidates: Candidates) -> Iterator[tuple[str, Float64Array]]:
    """The candidates' scores under each control, by the definitions of `neftsurgery.diff`."""
    if candidates.base_sq is not None:
        with np.errstate(divide="ignore"):
            yield (
                "norm",
                np.minimum(1 / np.sqrt(candidates.base_sq), _LARGEST).astype(np.float32).astype(np.float64),
            )
    yield "random", _random(candidates)


def _random(candidates: Candidates) -> Float64Array:
    from ..scoring.sums import random_scores  # imports numba

    drawn = np.empty(len(candidates))
    edges = np.searchsorted(candidates.tensor, np.arange(len(candidates.tensors) + 1))
    for number, name in enumerate(candidates.tensors):
        mine = candidates.index[edges[number] : edges[number + 1]]
        if len(mine):
            drawn[edges[number] : edges[number + 1]] = random_scores(name, int(mine.max()) + 1, 0)[mine]
    return drawn
