"""A results file of the selection suite, read by arm: means and standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import json_lines
from benchmarks.selection.arms import ARMS, Arm

Line = dict[str, Any]
OLD = ("english", "chinese", "backward", "articles")


@dataclass(frozen=True)
class Mean:
    """The mean over seeds and the standard deviation (with n - 1); no deviation for a single run."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, figures: Sequence[float]) -> Mean:
        """The mean of one or more figures."""
        return cls(mean(figures), stdev(figures) if len(figures) > 1 else None)

    def __format__(self, spec: str) -> str:
        """``2.345 ± 0.012``."""
        text = format(self.mean, spec)
        return text if self.deviation is None else f"{text} ± {format(self.deviation, spec)}"


@dataclass(frozen=True)
class Result:
    """An arm's runs by seed, and the runs of its search for a learning rate, by exponent."""

    arm: Arm
    runs: dict[int, Line]
    tried: dict[int, Line]

    def figure(self, of: Callable[[Line], float]) -> Mean:
        """A figure's mean over the seeds."""
        return Mean.of([of(run) for run in self.runs.values()])

    def sentences(self, which: str, seeds: Sequence[int]) -> NDArray[Any]:
        """A figure of each seed and test sentence, ``[seed, sentence]``."""
        return np.array([self.runs[seed]["sentences"][which] for seed in seeds])

    @property
    def at_bound(self) -> bool:
        """Whether the chosen learning rate is the highest or lowest one that was tried."""
        chosen = {run["rung"] for run in self.runs.values() if "rung" in run}
        return bool(chosen & {min(self.tried, default=None), max(self.tried, default=None)})


@dataclass(frozen=True)
class Study:
    """The content of a results file."""

    setting: Line
    base: Line
    results: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Study:
        """Reads a file; arms without a finished run are left out."""
        found = json_lines.load(file)
        (setting,) = (line for line in found if line["kind"] == "setting")
        (base,) = (line for line in found if line["kind"] == "base")
        return cls(setting, base, {result.arm.name: result for result in _results(found)})

    @property
    def untuned(self) -> Line:
        """The base's own figures."""
        (run,) = self.results["base"].runs.values()
        return run

    @property
    def translates(self) -> bool:
        """Whether the task is translation: other tasks have no BLEU."""
        return "bleu" in self.untuned

    def share(self, result: Result) -> float:
        """The trained share of the model's parameters, in percent."""
        return 100 * result.figure(lambda run: run["trainable"]).mean / float(self.base["parameters"])

    def forgotten(self, run: Line) -> float:
        """The loss added on old text, in nats per token: the mean over its four kinds."""
        return mean(run["old"][kind] - self.untuned["old"][kind] for kind in OLD)


def _results(found: list[Line]) -> Iterator[Result]:
    for arm in ARMS.values():
        mine = [line for line in found if line.get("arm") == arm.name]
        runs = {line["seed"]: line for line in mine if line["kind"] == "run"}
        if runs:
            tried = {line["rung"]: line for line in mine if line["kind"] == "tuning"}
            yield Result(arm, dict(sorted(runs.items())), tried)
