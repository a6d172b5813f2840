"""Runs the arms: first the search for the learning rate, then the seeds. Skips what the results file has."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import json_lines, machine
from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET
from benchmarks.selection.arms import ARMS, Arm
from benchmarks.selection.options import Options
from benchmarks.selection.rate_search import best_exponent, next_exponent
from benchmarks.selection.text import TextError

PACKAGES = ("neftsurgery", "numpy", "torch", "transformers", "tokenizers", "peft", "sacrebleu")
SEARCH_SEED = 0  # the seed of the search for the learning rate; the runs that count have seeds from 1 on


def measure(options: Options) -> None:
    """Makes the missing runs; writes ``options.results``."""
    os.environ.update(QUIET)
    deadline = time.monotonic() + 60 * options.minutes
    names = [name for name in options.only if name not in ("base", "full")]
    try:
        bench = _Suite(options, deadline)
        bench.prepare()
        bench.run_arm(ARMS["full"])
        bench.make_probes()
        if options.workers == 1:
            for name in names:
                bench.run_arm(ARMS[name])
        else:
            _in_parallel(options, names, deadline)
    except TextError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"stopped: {options.results} has the finished runs; the same command resumes")


def _in_parallel(options: Options, names: list[str], deadline: float) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        left = deadline - time.monotonic()
        for done in [pool.submit(_in_process, options, name, left) for name in names]:
            done.result()


def _in_process(options: Options, name: str, left: float) -> None:
    _Suite(options, time.monotonic() + left).run_arm(ARMS[name])


class _Suite:
    """The runs of one process, and the results file of all processes."""

    def __init__(self, options: Options, deadline: float) -> None:
        from benchmarks.selection.experiment import Experiment

        self._options, self._deadline = options, deadline
        self._experiment = Experiment(options)

    def prepare(self) -> None:
        """Stores or checks the setting, the base and its figures. Exits with a message on a mismatch."""
        options, experiment = self._options, self._experiment
        setting = experiment.setting
        (known,) = self._lines("setting") or (None,)
        if known is None:
            here = machine.describe(experiment.base.parent, PACKAGES)
            pairs = experiment.text.pairs
            self._store("setting", setting=setting, pairs=pairs, command=options.command, machine=here)
        elif known["setting"] != setting:
            sys.exit(
                f"{options.results} has results of another setting or text: use another --out, or move it"
            )
        if not experiment.base.is_dir():
            log("pre-training the base")
            experiment.pretrain_base(log)
        facts = experiment.base_facts()
        (base,) = self._lines("base") or (None,)
        if base is None:
            self._store("base", **facts, tokens=experiment.tokens())
        elif base["fingerprint"] != facts["fingerprint"]:
            sys.exit(
                f"{options.results} has results of another base than {experiment.base} (each machine makes "
                "its own): use another --out, or the --work that it was made with"
            )
        if not self._lines("run", arm="base"):
            self._store("run", arm="base", seed=1, **experiment.evaluate_base())

    def run_arm(self, arm: Arm) -> None:
        """Finds the arm's learning rate, then makes its runs, while there is time."""
        exponent = self._exponent(arm)
        for seed in range(1, self._options.seeds + 1):
            if exponent is None or self._out_of_time():
                return
            if not self._lines("run", arm=arm.name, seed=seed):
                facts = self._experiment.run(arm, seed, exponent, self._probe(arm, seed))
                self._store("run", arm=arm.name, seed=seed, rung=exponent, **facts)

    def make_probes(self) -> None:
        """Makes the full fine-tunes that serve as probes, before several processes need the same one."""
        exponent = self._exponent(ARMS["full"])
        for seed in range(SEARCH_SEED, self._options.seeds + 1):
            if exponent is not None and not self._out_of_time():
                self._experiment.probe(seed, exponent)

    def _exponent(self, arm: Arm) -> int | None:
        """The exponent of the arm's learning rate; None if there is no time left to find it."""
        while True:
            tried = {line["rung"]: line["loss"] for line in self._lines("tuning", arm=arm.name)}
            exponent = next_exponent(tried, *self._options.sizes.exponents)
            if exponent is None:
                return best_exponent(tried)
            if self._out_of_time():
                return None
            facts = self._experiment.tune(arm, SEARCH_SEED, exponent, self._probe(arm, SEARCH_SEED))
            self._store("tuning", arm=arm.name, seed=SEARCH_SEED, rung=exponent, **facts)

    def _probe(self, arm: Arm, seed: int) -> Path | None:
        if not arm.needs_probe:
            return None
        exponent = self._exponent(ARMS["full"])
        assert exponent is not None  # that arm runs first
        return self._experiment.probe(seed, exponent)

    def _out_of_time(self) -> bool:
        return time.monotonic() > self._deadline

    def _lines(self, kind: str, **like: Any) -> list[dict[str, Any]]:
        wanted = {"kind": kind, **like}.items()
        return [line for line in json_lines.load(self._options.results) if wanted <= line.items()]

    def _store(self, kind: str, **facts: Any) -> None:
        json_lines.append(self._options.results, {"kind": kind, **facts})
        figures = (
            f"{name} {facts[name]:.4g}"
            for name in ("rate", "loss", "test", "bleu", "chrf", "step")
            if name in facts
        )
        log(f"    {kind:8} {facts.get('arm', ''):16} {facts.get('seed', '')}  {'  '.join(figures)}")
