"""Runs the arms of a published model: rates, the best selectors, then the seeds. Resumes."""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import json_lines, machine
from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET
from benchmarks.selection.arms import Arm
from benchmarks.selection.pretrained.arms import (
    ARMS,
    BEST,
    CANDIDATES,
    CHANGE_SCORES,
    FIXED,
    SWEEP,
    chosen,
    control_of,
)
from benchmarks.selection.pretrained.options import PretrainedOptions
from benchmarks.selection.rate_search import best_exponent, next_exponent

PACKAGES = ("neftsurgery", "numpy", "torch", "transformers", "peft")
SEARCH_SEED = 0
_SPAN = 4  # exponents on either side of the first one


class OutOfTimeError(Exception):
    """No run is started any more."""


def measure(options: PretrainedOptions) -> None:
    """Makes the missing runs; writes ``options.results``."""
    os.environ.update(QUIET)
    try:
        _PretrainedSuite(options).run()
    except OutOfTimeError:
        log("no time is left: the same command resumes")
    except KeyboardInterrupt:
        sys.exit(f"stopped: {options.results} has the finished runs; the same command resumes")


class _PretrainedSuite:
    def __init__(self, options: PretrainedOptions) -> None:
        from benchmarks.selection.pretrained.experiment import PretrainedExperiment, Spot

        self._options, self._setting = options, options.setting
        self._deadline = time.monotonic() + 60 * options.minutes
        self._experiment, self._spot = PretrainedExperiment(options), Spot
        self._first = options.setting.tasks[0]

    def run(self) -> None:
        """All of it: the larger size first, and of a size one seed on all tasks first."""
        self._prepare()
        for examples in self._options.examples or self._setting.examples:
            for seed in range(1, self._options.seeds + 1):
                for task in self._options.tasks:
                    self._start(task, examples, seed)
                    for arm in self._arms():
                        self._run_arm(arm, task, examples, seed)
                if examples == self._setting.examples[0] and self._first in self._options.tasks:
                    for arm in self._swept():
                        self._run_arm(arm, self._first, examples, seed)

    def _prepare(self) -> None:
        options, described = self._options, self._options.describe()
        (known,) = self._lines("setting") or (None,)
        if known is None:
            here = machine.describe(options.out, PACKAGES)
            facts = {
                "parameters": self._experiment.parameters(),
                "date": datetime.now(UTC).date().isoformat(),
            }
            self._store("setting", setting=described, command=options.command, machine=here, **facts)
        elif known["setting"] != described:
            sys.exit(f"{options.results} has results of another setting: use another --out, or move it")

    def _start(self, task: str, examples: int, seed: int) -> None:
        where = {"task": task, "examples": examples, "seed": seed}
        if not self._lines("run", arm="start", **where):
            facts = self._experiment.start(self._spot(task, examples, seed))
            self._store("run", arm="start", **where, **facts)

    def _arms(self) -> list[Arm]:
        """The fixed arms, and the candidates that were best on the first task's dev set."""
        if self._options.only:
            return [ARMS[name] for name in self._options.only]
        if self._setting.arms:  # and the encoder's best candidate
            best = _screened(self._options.out / "pretrained-minilm.jsonl")[:1]
            return [ARMS[name] for name in (*self._setting.arms, *best)]
        found = FIXED | {name: CANDIDATES[name] for name in self._best()}
        return list(found.values())

    def _swept(self) -> list[Arm]:
        if self._options.only or self._setting.arms:
            return []
        one = CANDIDATES[self._best()[0]]
        return [chosen(one.anatomy, one.score, percent=percent) for percent in SWEEP]

    def _best(self) -> list[str]:
        """The candidates with the lowest dev loss, each at the rate of its random control."""
        task, examples = self._first, self._setting.examples[0]
        for arm in CANDIDATES.values():
            if not self._lines("screen", arm=arm.name):
                exponent = self._exponent(ARMS[control_of(arm)], task)
                facts = self._run(arm, task, examples, SEARCH_SEED, exponent, counts=False)
                self._store("screen", arm=arm.name, task=task, examples=examples, rung=exponent, **facts)
        return _screened(self._options.results)[:BEST]

    def _run_arm(self, arm: Arm, task: str, examples: int, seed: int) -> None:
        where = {"task": task, "examples": examples, "seed": seed}
        if not self._lines("run", arm=arm.name, **where):
            exponent = self._exponent(arm, task)
            facts = self._run(arm, task, examples, seed, exponent, counts=True)
            self._store("run", arm=arm.name, **where, rung=exponent, **facts)

    def _run(
        self, arm: Arm, task: str, examples: int, seed: int, exponent: int, *, counts: bool
    ) -> dict[str, Any]:
        if time.monotonic() > self._deadline:
            raise OutOfTimeError
        needs = arm.score in CHANGE_SCORES and arm.kind == "neurons"
        probe = self._exponent(ARMS["full"], task) if needs else None
        return self._experiment.run(
            arm, self._spot(task, examples, seed), exponent, probe=probe, counts=counts
        )

    def _exponent(self, arm: Arm, task: str) -> int:
        """The exponent of an arm's rate: of the ladder on the task, with many examples.

        Where the arms are given, as runs take long, a selector has the rate of its random control.
        """
        if self._setting.arms and arm.name in CANDIDATES:
            arm = ARMS[control_of(arm)]
        lines = self._lines("tuning", arm=arm.name, task=task)
        tried = {line["rung"]: _trained_loss(line) for line in lines}
        start = self._setting.starts.get(arm.kind, self._setting.starts.get(arm.anatomy, 0))
        while (exponent := next_exponent(tried, start, start - _SPAN, start + _SPAN)) is not None:
            facts = self._run(arm, task, self._setting.examples[0], SEARCH_SEED, exponent, counts=False)
            self._store("tuning", arm=arm.name, task=task, seed=SEARCH_SEED, rung=exponent, **facts)
            tried[exponent] = _trained_loss(facts)
        return best_exponent(tried)

    def _lines(self, kind: str, **like: Any) -> list[dict[str, Any]]:
        wanted = {"kind": kind, **like}.items()
        return [line for line in json_lines.load(self._options.results) if wanted <= line.items()]

    def _store(self, kind: str, **facts: Any) -> None:
        json_lines.append(self._options.results, {"kind": kind, **facts})
        where = f"{facts.get('task', '')} {facts.get('examples', '')} {facts.get('seed', '')}"
        figures = "  ".join(f"{name} {facts[name]:.4g}" for name in ("rate", "loss", "step") if name in facts)
        log(f"    {kind:8} {facts.get('arm', ''):24} {where:14} {figures}")


def _trained_loss(facts: dict[str, Any]) -> float:
    """The lowest dev loss after training: that before it is the same for all rates."""
    return min(float(look["loss"]) for step, look in facts["dev"].items() if int(step) > 0)


def _screened(results: Path) -> list[str]:
    """The candidates of a results file, the one with the lowest dev loss first."""
    found = {line["arm"]: line["loss"] for line in json_lines.load(results) if line["kind"] == "screen"}
    return sorted(found, key=lambda name: (found[name], name))
