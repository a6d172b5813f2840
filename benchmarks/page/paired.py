"""Two arms compared in pairs: run by run of the same seed, and sentence by sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

DRAWS = 10_000  # of the bootstrap


@dataclass(frozen=True)
class Interval:
    """A difference, and where it lies with 95% confidence."""

    middle: float
    least: float
    most: float

    def __format__(self, spec: str) -> str:
        """``-0.031 (-0.042 to -0.020)``, with signs; bold where 0 is not in it."""
        middle, least, most = (format(x, f"+{spec}") for x in (self.middle, self.least, self.most))
        text = f"{middle} ({least} to {most})"
        return f"**{text}**" if self.least > 0 or self.most < 0 else text


@dataclass(frozen=True)
class OverSeeds:
    """What a paired t-test over seeds says; ``interval`` and ``p`` are None for a single seed."""

    seeds: int
    middle: float
    interval: Interval | None
    p: float | None


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> OverSeeds:
    """``ours`` minus ``theirs``, run by run of equal seeds: would other seeds say the same?"""
    differences = np.subtract(ours, theirs)
    middle = float(differences.mean())
    if len(differences) < 2 or np.ptp(differences) == 0:  # no spread tells nothing
        return OverSeeds(len(differences), middle, None, None)
    found = ttest_rel(ours, theirs)
    low, high = found.confidence_interval(0.95)
    return OverSeeds(len(differences), middle, Interval(middle, float(low), float(high)), float(found.pvalue))


def over_sentences(
    ours: NDArray[Any], theirs: NDArray[Any], weights: Sequence[float], draws: int = DRAWS
) -> Interval:
    """``ours`` minus ``theirs``, ``[seed, sentence]`` sums, per unit of ``weights``, ``[sentence]``.

    A bootstrap of the sentences, of the mean over the seeds there are: would other sentences say the same
    of these very models? It tells nothing of other seeds.
    """
    difference, weight = (ours - theirs).mean(0), np.asarray(weights, np.float64)
    times = _times_drawn(len(weight), draws)
    drawn = (times @ difference) / (times @ weight)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(difference.sum() / weight.sum()), float(low), float(high))


@lru_cache(maxsize=2)
def _times_drawn(count: int, draws: int) -> NDArray[Any]:
    """How often each sentence is in each draw, ``[draw, sentence]``: the same draws for every comparison."""
    times: NDArray[Any] = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    return times.astype(np.float64)
