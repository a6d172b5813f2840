"""What scores say in a few numbers: where a model moved, and what a budget would capture of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import NeftError
from ..neurons.tensor_names import layer_and_kind
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..tensors.arrays import Float64Array
from ..text import natural_key

_SUMS = ("base_sq", "delta_sq", "dot")
_BUDGETS = ("1%", "3%", "10%")
#: Below this cosine two models are as good as independent; fine-tuning leaves it near 1.
_UNRELATED = 0.2


@dataclass(frozen=True, slots=True)
class Movement:
    """How far a layer, or the weights of a kind, moved."""

    name: str
    relative_change: float  # norm of the difference over norm of the base
    share_of_change: float  # of the squared change of all scored tensors


@dataclass(frozen=True, slots=True)
class Neuron:
    """One neuron and its score."""

    tensor: str
    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A scores file in a few numbers."""

    neurons: int
    changed_neurons: int | None  # with a differing bit; None: the file does not tell
    nonfinite: int  # neurons with a NaN or Inf
    cosine: float  # of all scored weights of base and tuned together; NaN if one side is all zeros
    relative_change: float  # as in Movement; NaN without sums
    layers: list[Movement]  # those that moved most first, as kinds
    kinds: list[Movement]
    most_sensitive: list[Neuron]  # the first one most
    captured_by_budget: dict[str, float]  # shares of the change of all common tensors
    unscored_changed: list[str]  # tensors with a differing bit that are not scored, by name

    @property
    def identical(self) -> bool:
        """Whether no bit of any scored neuron differs."""
        return self.changed_neurons == 0

    @property
    def related(self) -> bool:
        """Whether the tuned checkpoint looks as if it came from the base at all."""
        return not self.cosine < _UNRELATED

    def describe(self) -> dict[str, object]:
        """For JSON, which has no infinity and no NaN."""
        related = None if self.changed_neurons is None else self.related
        facts = asdict(self, dict_factory=_finite) | {"related": related}
        return {key: value for key, value in facts.items() if key != "neurons"}


def _finite(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in pairs}


def _relative(base: float, delta: float) -> float:
    return math.sqrt(delta / base) if base > 0 else math.inf if delta else 0.0


def summarize(scores: Scores, *, top: int = 10) -> Summary:
    """Sum scores up, tensor by tensor. Without sums in the file, what needs them is NaN or empty."""
    counts = [int(np.count_nonzero(batch.sums["changed"])) for batch in scores.batches("changed")]
    names, totals = list[str](), [np.zeros((0, len(_SUMS)))]
    for batch in scores.batches(*_SUMS):
        names += [tensor.info.name for tensor in batch.tensors]
        totals.append(np.stack([batch.totals(which) for which in _SUMS], axis=1))
    sums = np.concatenate(totals)
    layers = _grouped([scores.tensors[name].layer for name in names], sums)
    layers.pop("", None)
    kinds = _grouped([layer_and_kind(name)[1] for name in names], sums)
    base, delta, dot = _grouped([""] * len(names), sums).get("", np.zeros(len(_SUMS))).tolist()
    norms = math.sqrt(base) * math.sqrt(max(base + 2 * dot + delta, 0.0))
    try:
        most = _top(scores, scores.choose(Budget.of(neurons=top)))[:top]
        shares = {budget: scores.choose(Budget.of(neurons=budget)).facts.captured for budget in _BUDGETS}
    except NeftError:  # no neuron can be chosen when all hold a NaN, say
        most, shares = [], {}
    return Summary(
        scores.neurons,
        sum(counts) if scores.have("changed") else None,
        scores.nonfinite,
        (base + dot) / norms if norms > 0 else math.nan,
        _relative(base, delta) if names else math.nan,
        _moved(layers, delta),
        _moved(kinds, delta),
        most,
        {budget: share for budget, share in shares.items() if share is not None},
        sorted(name for name, entry in scores.unscored.items() if entry.changed),
    )


def _grouped(names: Sequence[str], sums: Float64Array) -> dict[str, Float64Array]:
    """The rows of ``sums`` that have one name, added up in order."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(name, len(numbers)) for name in names]
    found = np.zeros((len(numbers), sums.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        np.add.at(found, places, sums)
    return dict(zip(numbers, found, strict=True))


def _moved(groups: Mapping[str, Float64Array], whole: float) -> list[Movement]:
    sums = [(name, *group.tolist()) for name, group in groups.items()]
    found = [Movement(name, _relative(base, d), d / whole if whole else 0.0) for name, base, d, _ in sums]
    return sorted(found, key=lambda m: (-m.relative_change, natural_key(m.name)))


def _top(scores: Scores, chosen: Selection) -> list[Neuron]:
    """The chosen neurons, the most sensitive first."""
    found = []
    for name, part in chosen.tensors.items():
        values = scores.values(name)[part.index]
        found += [Neuron(name, int(i), float(v)) for i, v in zip(part.index, values, strict=True)]
    return sorted(found, key=lambda n: (-n.score, n.tensor, n.index))
