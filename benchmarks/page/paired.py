"""Compares two arms in pairs: runs of the same seed, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

DRAWS = 10_000  # resamples of the bootstrap


@dataclass(frozen=True)
class Interval:
    """A difference with its 95% confidence interval."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """``-0.031 (-0.042 to -0.020)``, with signs; bold if 0 is not in the interval."""
        estimate, low, high = (format(x, f"+{spec}") for x in (self.estimate, self.low, self.high))
        text = f"{estimate} ({low} to {high})"
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


@dataclass(frozen=True)
class OverSeeds:
    """The result of a paired t-test over seeds; ``interval`` and ``p`` are None for a single seed."""

    seeds: int
    mean: float
    interval: Interval | None
    p: float | None


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> OverSeeds:
    """``ours`` minus ``theirs`` for runs of equal seeds: would other seeds agree?"""
    differences = np.subtract(ours, theirs)
    mean = float(differences.mean())
    if len(differences) < 2 or np.ptp(differences) == 0:  # without variance there is no test
        return OverSeeds(len(differences), mean, None, None)
    found = ttest_rel(ours, theirs)
    low, high = found.confidence_interval(0.95)
    return OverSeeds(len(differences), mean, Interval(mean, float(low), float(high)), float(found.pvalue))


def over_sentences(
    ours: NDArray[Any], theirs: NDArray[Any], weights: Sequence[float], draws: int = DRAWS
) -> Interval:
    """``ours`` minus ``theirs``, ``[seed, sentence]`` sums, per unit of ``weights``, ``[sentence]``.

    A bootstrap over the sentences of the mean over seeds: would other sentences agree about these models? It
    says nothing about other seeds.
    """
    difference, weight = (ours - theirs).mean(0), np.asarray(weights, np.float64)
    times = _times_drawn(len(weight), draws)
    drawn = (times @ difference) / (times @ weight)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(difference.sum() / weight.sum()), float(low), float(high))


@lru_cache(maxsize=2)
def _times_drawn(count: int, draws: int) -> NDArray[Any]:
    """How often each sentence is in each draw, ``[draw, sentence]``. All comparisons use the same draws."""
    times: NDArray[Any] = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    return times.astype(np.float64)
