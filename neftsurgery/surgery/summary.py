"""What scores say in a few numbers: where a model moved, and what a budget would capture of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import NeftError
from ..neurons.tensor_names import layer_and_kind
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection

__all__ = ["Movement", "Neuron", "Summary", "summarize"]

_SUMS = ("base_sq", "delta_sq", "dot")
_BUDGETS = ("1%", "3%", "10%")
#: Below this cosine two models are as good as independent; fine-tuning leaves it near 1.
_UNRELATED = 0.2


@dataclass(frozen=True, slots=True)
class Movement:
    """How far a group of scored tensors moved.

    Attributes
    ----------
    name:
        A layer or a kind of weight.
    relative:
        Norm of the difference over the norm of the base.
    share:
        Of the squared change of all scored tensors.
    """

    name: str
    relative: float
    share: float


@dataclass(frozen=True, slots=True)
class Neuron:
    """One neuron and its score."""

    tensor: str
    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A scores file in a few numbers.

    Attributes
    ----------
    neurons, units, changed_neurons, nonfinite:
        Scored neurons; the units they form (0 without); those with a differing bit; those with a NaN or Inf.
    cosine:
        Between all scored weights of base and tuned together; NaN if one is all zeros.
    relative:
        Norm of their difference over the norm of the base.
    layers, kinds:
        Groups of tensors, those that moved most first.
    top:
        The most sensitive neurons, the first one first.
    captured:
        Per budget, the share of the change of all common tensors its neurons hold.
    """

    neurons: int
    units: int
    changed_neurons: int
    nonfinite: int
    cosine: float
    relative: float
    layers: tuple[Movement, ...]
    kinds: tuple[Movement, ...]
    top: tuple[Neuron, ...]
    captured: dict[str, float]

    @property
    def identical(self) -> bool:
        """Whether no bit of any scored neuron differs."""
        return self.changed_neurons == 0

    @property
    def related(self) -> bool:
        """Whether the tuned checkpoint looks as if it came from the base at all."""
        return not self.cosine < _UNRELATED

    def describe(self) -> dict[str, object]:
        """For JSON."""
        return {
            "changed_neurons": self.changed_neurons,
            "nonfinite": self.nonfinite,
            "cosine": _finite(self.cosine),
            "relative_change": _finite(self.relative),
            "related": self.related,
            "layers": [_movement(m) for m in self.layers],
            "kinds": [_movement(m) for m in self.kinds],
            "most_sensitive": [{"tensor": n.tensor, "index": n.index, "score": n.score} for n in self.top],
            "captured_by_budget": self.captured,
        }


def _movement(movement: Movement) -> dict[str, object]:
    return {
        "name": movement.name,
        "relative_change": _finite(movement.relative),
        "share_of_change": _finite(movement.share),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Totals:
    """Sums over a group of tensors."""

    def __init__(self) -> None:
        self.base = self.delta = self.dot = 0.0

    def add(self, base: float, delta: float, dot: float) -> None:
        self.base += base
        self.delta += delta
        self.dot += dot

    @property
    def relative(self) -> float:
        return math.sqrt(self.delta / self.base) if self.base > 0 else math.inf if self.delta else 0.0

    @property
    def cosine(self) -> float:
        tuned = self.base + 2 * self.dot + self.delta
        size = math.sqrt(self.base) * math.sqrt(max(tuned, 0.0))
        return (self.base + self.dot) / size if size > 0 else math.nan


def summarize(scores: Scores, *, top: int = 10) -> Summary:
    """Sum scores up; reads all of the file, tensor by tensor.

    A scores file that holds no sums gives NaN and empty groups where they are needed.
    """
    whole, layers, kinds = _Totals(), dict[str, _Totals](), dict[str, _Totals]()
    changed = sum(int(np.count_nonzero(batch.sums["changed"])) for batch in scores.batches("changed"))
    for batch in scores.batches(*_SUMS):
        totals = [batch.totals(which).tolist() for which in _SUMS]
        for tensor, *sums in zip(batch.tensors, *totals, strict=True):
            groups = [whole, kinds.setdefault(layer_and_kind(tensor.info.name.split("."))[1], _Totals())]
            if tensor.layer:
                groups.append(layers.setdefault(tensor.layer, _Totals()))
            for group in groups:
                group.add(*sums)
    return Summary(
        scores.neurons,
        scores.units,
        changed,
        scores.nonfinite,
        whole.cosine,
        whole.relative,
        _moved(layers, whole.delta),
        _moved(kinds, whole.delta),
        tuple(_top(scores, top)),
        dict(_captures(scores)),
    )


def _moved(groups: dict[str, _Totals], whole: float) -> tuple[Movement, ...]:
    found = [Movement(name, t.relative, t.delta / whole if whole else 0.0) for name, t in groups.items()]
    return tuple(sorted(found, key=lambda m: (-m.relative, m.name)))


def _captures(scores: Scores) -> Iterator[tuple[str, float]]:
    for budget in _BUDGETS:
        chosen = _choose(scores, Budget.of(neurons=budget))
        if chosen is not None and chosen.facts.captured is not None:
            yield budget, chosen.facts.captured


def _top(scores: Scores, count: int) -> Iterator[Neuron]:
    chosen = _choose(scores, Budget.of(neurons=count))
    if chosen is None:
        return
    found = []
    for name, part in chosen.tensors.items():
        values = scores.values(name)[part.index]
        found += [Neuron(name, int(i), float(v)) for i, v in zip(part.index, values, strict=True)]
    yield from sorted(found, key=lambda n: (-n.score, n.tensor, n.index))[:count]


def _choose(scores: Scores, budget: Budget) -> Selection | None:
    """A choice that may be impossible: no neuron has a score when all hold a NaN, say."""
    try:
        return scores.choose(budget)
    except NeftError:
        return None
