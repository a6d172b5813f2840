"""Does "sensitive" mean more than "small"? A score beside the controls ``norm`` and ``random``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .. import text
from .drawing import ACCENT, CONTRAST, INK, MUTED, WIDTH, Canvas, legend_above, quiet
from .figure import Column, Figure, Table
from .growth import PERCENTS
from .subjects import Items

__all__ = ["Agreement", "Control", "spearman"]

_LARGEST = float(np.finfo(np.float32).max)
_KINDS = 12
#: From these on a score is called another word for the norm, or partly so: rank correlation, or how much
#: of the way from chance to all of the chosen ones the norm would choose too.
_SAME, _PARTLY = 0.7, 0.35

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Control:
    """A score beside a control.

    Attributes
    ----------
    name:
        ``norm`` or ``random``.
    correlation:
        Spearman's rank correlation over all items; NaN where one of the two is constant.
    by_kind:
        The same within each kind of weight.
    overlaps:
        Per budget how many items both would choose.
    chosen:
        Of the chosen items, how many the control would choose as well, if it chose as many.
    """

    name: str
    correlation: float
    by_kind: tuple[float, ...]
    overlaps: tuple[int, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """A score beside its controls.

    Attributes
    ----------
    score, word:
        Which score, of what: ``neuron`` or ``unit``.
    count, chosen:
        Items that have a score, and those that are chosen.
    kinds, sizes:
        Kinds of weight, and items of each.
    taken:
        Per budget of `PERCENTS`, how many items it takes, of one pool.
    controls:
        ``norm``, where the scores file holds the norms, and ``random``.
    """

    score: str
    word: str
    count: int
    chosen: int
    kinds: tuple[str, ...]
    sizes: tuple[int, ...]
    taken: tuple[int, ...]
    controls: tuple[Control, ...]

    @classmethod
    def of(cls, items: Items, score: str) -> Agreement:
        """The agreement of the items' scores with the controls."""
        count = len(items)
        # As a budget of so many percent rounds.
        taken = tuple(max(1, int(Fraction(p) * count / 100 + Fraction(1, 2))) for p in PERCENTS)
        mine = items.score.astype(np.float64)
        rank = _places(items.order)
        # The items of each kind, without a look at all of them per kind.
        edges = np.cumsum(np.bincount(items.kind, minlength=len(items.kinds)))[:-1]
        parts = np.split(np.argsort(items.kind, kind="stable"), edges)
        found = []
        for name, values in _controls(items):
            other = _places(np.argsort(-values, kind="stable"))
            both = np.cumsum(np.bincount(np.maximum(rank, other), minlength=count))
            by_kind = tuple(spearman(mine[part], values[part]) for part in parts)
            chosen = int(items.chosen.sum())
            found.append(
                Control(
                    name,
                    spearman(mine, values),
                    by_kind,
                    tuple(int(both[k - 1]) for k in taken),
                    int((items.chosen & (other < chosen)).sum()),
                )
            )
        sizes = tuple(np.bincount(items.kind, minlength=len(items.kinds)).tolist())
        return cls(score, items.word, count, int(items.chosen.sum()), items.kinds, sizes, taken, tuple(found))

    @property
    def verdict(self) -> str:
        """Whether sensitive means more than small, in a sentence or two."""
        norm = next((control for control in self.controls if control.name == "norm"), None)
        if self.score in ("norm", "random"):
            return f"This score is the control {self.score} itself."
        if norm is None:
            return "These scores do not tell the norms, so the control norm is missing."
        overlap, chance = norm.chosen / self.chosen, self.chosen / self.count
        excess = (overlap - chance) / (1 - chance) if chance < 1 else 0.0
        facts = (
            f"the rank correlation with smallness is {text.signed(norm.correlation)}, and "
            f"{text.percent(overlap)} of the chosen {self.word}s are among the {text.amount(self.chosen)} "
            f"smallest, where chance would give {text.percent(chance)}"
        )
        strength = max(excess, norm.correlation) if norm.correlation == norm.correlation else excess
        if strength >= _SAME:
            return f"Here sensitive says little more than small: {facts}."
        if strength >= _PARTLY:
            return f"Here sensitive partly means small: {facts}."
        if norm.correlation <= -_SAME:
            return f"Here sensitive mostly means large: {facts}."
        return f"Here sensitive means more than small: {facts}."

    def overlap_figure(self, id: str = "agreement") -> Figure:
        """How many of the chosen ones the controls would choose, over the budget."""
        columns = (
            Column("budget", "budget"),
            Column("control", "control"),
            Column("chosen", f"{self.word}s chosen", text.amount),
            Column("shared", "chosen by both", text.amount),
            Column("overlap", "share", text.percent, bar=True),
            Column("jaccard", "Jaccard", text.percent),
            Column("chance", "by chance", text.percent),
        )
        rows = tuple(
            (f"{percent}%", control.name, k, shared, shared / k, shared / (2 * k - shared), k / self.count)
            for control in self.controls
            for percent, k, shared in zip(PERCENTS, self.taken, control.overlaps, strict=True)
        )
        return Figure(
            id,
            "Does sensitive mean more than small?",
            f"percent of the most sensitive {self.word}s that a control would choose too, over the budget",
            f"The control norm chooses the {self.word}s with the smallest vectors, random chooses any. A "
            "line on the dashed one is what chance gives: the control knows nothing of the score. The nearer "
            "to 100%, the more the score is the control under another name.",
            Table(columns, rows),
            self._draw_overlaps,
            self.verdict,
        )

    def _draw_overlaps(self, canvas: Canvas) -> None:
        canvas.set_size_inches(WIDTH, 2.7)
        axes = canvas.add_subplot()
        place = np.arange(len(PERCENTS))
        chance = 100 * np.array(self.taken) / self.count
        marks = {"norm": ("s", CONTRAST), "random": ("o", ACCENT)}
        top = float(chance.max())
        for control in self.controls:
            mark, colour = marks[control.name]
            share = 100 * np.array(control.overlaps) / np.array(self.taken)
            top = max(top, float(share.max()))
            axes.plot(
                place, share, color=colour, marker=mark, markersize=5, linewidth=1.6, label=control.name
            )
        axes.plot(place, chance, color=MUTED, linestyle=(0, (4, 2)), linewidth=1, label="chance")
        axes.set_xticks(place, [f"{percent}%" for percent in PERCENTS])
        axes.set_ylim(0, min(105, 1.2 * top))
        axes.set_xlim(-0.4, len(place) - 0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel(f"of the {self.word}s are chosen")
        axes.set_ylabel("of these the control takes")
        legend_above(axes)
        quiet(axes, grid="y")

    def correlation_figure(self, id: str = "correlation") -> Figure:
        """Rank correlations with the controls, in all and by kind of weight."""
        columns = (
            Column("kind", "kind of weight", text.label),
            Column("control", "control"),
            Column("count", f"{self.word}s", text.amount),
            Column("correlation", "rank correlation", text.number),
        )
        rows = [("all", c.name, self.count, c.correlation) for c in self.controls]
        for number, kind in enumerate(self.kinds):
            rows += [(kind, c.name, self.sizes[number], c.by_kind[number]) for c in self.controls]
        return Figure(
            id,
            "How the score ranks beside the controls",
            "Spearman's rank correlation: 1 the same order, 0 no relation, -1 the reverse order",
            "A square is the correlation with the control norm (small vectors first), a circle that with "
            "random, which is 0 but for chance. A square far right: sensitive ones are the small ones; far "
            "left: the large ones. Kinds of weight can differ from all, as their vectors differ in size.",
            Table(columns, tuple(rows)),
            self._draw_correlations,
        )

    def _draw_correlations(self, canvas: Canvas) -> None:
        shown = np.sort(np.argsort([-size for size in self.sizes], kind="stable")[:_KINDS])
        canvas.set_size_inches(WIDTH, 0.65 + 0.27 * (len(shown) + 1))
        axes = canvas.add_subplot()
        names = ["all", *(text.label(self.kinds[kind], 28) for kind in shown)]
        axes.axvline(0, color=MUTED, linewidth=0.8)
        marks = {"norm": ("s", CONTRAST), "random": ("o", ACCENT)}
        for control in self.controls:
            mark, colour = marks[control.name]
            values = [control.correlation, *(control.by_kind[kind] for kind in shown)]
            axes.plot(values, range(len(values)), mark, color=colour, markersize=5.5, label=control.name)
            if control.name == "norm":
                for row, value in enumerate(values):
                    if value == value:
                        axes.annotate(
                            text.signed(value),
                            (value, row),
                            (8 if value >= 0 else -8, 0),
                            textcoords="offset points",
                            ha="left" if value >= 0 else "right",
                            va="center",
                            color=INK,
                        )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-1.15, 1.15)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], [text.signed(tick) for tick in (-1, -0.5, 0, 0.5, 1)])
        axes.set_xlabel("rank correlation with the control")
        legend_above(axes)
        quiet(axes, grid="both")


def spearman(one: F64, other: F64) -> float:
    """Spearman's rank correlation of two vectors, ties given their mean rank; NaN if one is constant."""
    if len(one) < 2:
        return np.nan
    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    size = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(a @ b) / size if size > 0 else np.nan


def _ranks(values: F64) -> F64:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: F64 = (last - (counts - 1) / 2)[inverse]
    return mean


def _places(order: I64) -> I64:
    """Of each item its place in ``order``."""
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def _controls(items: Items) -> Iterator[tuple[str, F64]]:
    """The controls' scores of the items, as `neftsurgery.diff` defines them; of units, by the same rule."""
    if items.base_sq is not None:
        with np.errstate(divide="ignore"):
            yield (
                "norm",
                np.minimum(1 / np.sqrt(items.base_sq), _LARGEST).astype(np.float32).astype(np.float64),
            )
    yield "random", _random(items)


def _random(items: Items) -> F64:
    from ..scoring.sums import random_scores  # brings the compiler of the scoring kernels with it

    drawn = np.empty(len(items))
    edges = np.searchsorted(items.tensor, np.arange(len(items.tensors) + 1))
    for number, name in enumerate(items.tensors):
        mine = items.index[edges[number] : edges[number + 1]]
        if len(mine):
            drawn[edges[number] : edges[number + 1]] = random_scores(name, int(mine.max()) + 1, 0)[mine]
    return drawn
