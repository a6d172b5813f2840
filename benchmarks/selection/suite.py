"""Works off the arms: the learning rate first, then the seeds. What the results file has is not redone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness import lines, machine
from benchmarks.harness.contest import say
from benchmarks.harness.process import QUIET
from benchmarks.selection.arms import ARMS, Arm
from benchmarks.selection.ladder import best_rung, next_rung
from benchmarks.selection.options import Options
from benchmarks.selection.text import TextError

PACKAGES = ("neftsurgery", "numpy", "torch", "transformers", "tokenizers", "peft", "sacrebleu")
TUNED = 0  # the seed of the runs that find the learning rate; those that count have the seeds from 1 on


def measure(options: Options) -> None:
    """Makes the runs that are missing, into ``options.results``."""
    os.environ.update(QUIET)
    deadline = time.monotonic() + 60 * options.minutes
    names = [name for name in options.only if name not in ("base", "full")]
    try:
        bench = _Bench(options, deadline)
        bench.prepare()
        bench.work_off(ARMS["full"])
        bench.make_probes()
        if options.workers == 1:
            for name in names:
                bench.work_off(ARMS[name])
        else:
            _side_by_side(options, names, deadline)
    except TextError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"stopped: {options.results} has what was finished, and the same command goes on from there")


def _side_by_side(options: Options, names: list[str], deadline: float) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context) as pool:
        left = deadline - time.monotonic()
        for done in [pool.submit(_in_process, options, name, left) for name in names]:
            done.result()


def _in_process(options: Options, name: str, left: float) -> None:
    _Bench(options, time.monotonic() + left).work_off(ARMS[name])


class _Bench:
    """The runs of one process, and the file of all."""

    def __init__(self, options: Options, deadline: float) -> None:
        from benchmarks.selection.laboratory import Laboratory

        self._options, self._deadline = options, deadline
        self._laboratory = Laboratory(options)

    def prepare(self) -> None:
        """The setting, the base, and the base's own figures. Leaves with a message where they do not fit."""
        options, laboratory = self._options, self._laboratory
        setting = laboratory.setting
        (known,) = self._found("setting") or (None,)
        if known is None:
            here = machine.describe(laboratory.base.parent, PACKAGES)
            pairs = laboratory.text.pairs
            self._keep("setting", setting=setting, pairs=pairs, command=options.command, machine=here)
        elif known["setting"] != setting:
            sys.exit(
                f"{options.results} is of another setting or other text; give another --out, or move it away"
            )
        if not laboratory.base.is_dir():
            say("pre-training the base")
            laboratory.make_base(say)
        facts = laboratory.base_facts()
        (base,) = self._found("base") or (None,)
        if base is None:
            self._keep("base", **facts, tokens=laboratory.tokens())
        elif base["fingerprint"] != facts["fingerprint"]:
            sys.exit(
                f"{options.results} is of another base than {laboratory.base}: another machine makes another "
                "one. Give another --out, or the --work it was made in"
            )
        if not self._found("run", arm="base"):
            self._keep("run", arm="base", seed=1, **laboratory.examine_base())

    def work_off(self, arm: Arm) -> None:
        """Finds the arm's learning rate, then makes its runs; until the time is over."""
        rung = self._rung(arm)
        for seed in range(1, self._options.seeds + 1):
            if rung is None or self._late():
                return
            if not self._found("run", arm=arm.name, seed=seed):
                facts = self._laboratory.run(arm, seed, rung, self._probe(arm, seed))
                self._keep("run", arm=arm.name, seed=seed, rung=rung, **facts)

    def make_probes(self) -> None:
        """The full fine-tunes that neurons are chosen by, before several processes ask for the same one."""
        rung = self._rung(ARMS["full"])
        for seed in range(TUNED, self._options.seeds + 1):
            if rung is not None and not self._late():
                self._laboratory.probe(seed, rung)

    def _rung(self, arm: Arm) -> int | None:
        """Where on the ladder of learning rates it stands; None: there was no time to find out."""
        while True:
            tried = {line["rung"]: line["loss"] for line in self._found("tuning", arm=arm.name)}
            rung = next_rung(tried, *self._options.sizes.rungs)
            if rung is None:
                return best_rung(tried)
            if self._late():
                return None
            facts = self._laboratory.tune(arm, TUNED, rung, self._probe(arm, TUNED))
            self._keep("tuning", arm=arm.name, seed=TUNED, rung=rung, **facts)

    def _probe(self, arm: Arm, seed: int) -> Path | None:
        if not arm.probed:
            return None
        rung = self._rung(ARMS["full"])
        assert rung is not None  # it was worked off first
        return self._laboratory.probe(seed, rung)

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def _found(self, kind: str, **like: Any) -> list[dict[str, Any]]:
        wanted = {"kind": kind, **like}.items()
        return [line for line in lines.load(self._options.results) if wanted <= line.items()]

    def _keep(self, kind: str, **facts: Any) -> None:
        lines.append(self._options.results, {"kind": kind, **facts})
        figures = (
            f"{name} {facts[name]:.4g}"
            for name in ("rate", "loss", "test", "bleu", "chrf", "step")
            if name in facts
        )
        say(f"    {kind:8} {facts.get('arm', ''):16} {facts.get('seed', '')}  {'  '.join(figures)}")
