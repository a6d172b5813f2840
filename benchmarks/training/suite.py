"""Starts the workers, lets them step in turns, and stores their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from statistics import median
from typing import Any

from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET, CommandError
from benchmarks.training.options import ALL_CONTESTANTS, EXPERTS, USUAL, Options

RESULTS = "training.json"


def measure(options: Options) -> None:
    """Measures one setting; writes ``options.out/training.json``."""
    here = machine.describe(options.out.parent if options.out.parent.exists() else options.out)
    began = time.perf_counter()
    log(f"starting {len(options.only)} workers")
    workers = [Worker(name, options) for name in options.only]
    try:
        for worker in workers:
            worker.wait_until_ready()
        if all(worker.skipped for worker in workers):
            sys.exit("nothing could be measured: every contestant failed")
        for number in range(options.rounds):
            for worker in workers:
                worker.take_turn(options.steps)
            log(f"    round {number + 1}/{options.rounds}  (at {time.perf_counter() - began:.0f} s)")
    finally:
        for worker in workers:
            worker.close()
    usual = (options.batch, options.length) == USUAL
    tokens = "" if usual else f", {options.batch} x {options.length} tokens"
    title = f"{options.shape}, {options.layers} layers, {options.dtype}{tokens}, on {_device(options.device)}"
    part = {
        "title": title + (", gradient checkpointing" if options.checkpointing else ""),
        "command": options.command(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": here,
        "device": options.device,
        "experts": options.shape in EXPERTS,
        "tokens": options.batch * options.length,
        "contestants": [worker.result() for worker in workers],
    }
    results.store(options.out / RESULTS, options.part, part)


def _device(device: str) -> str:
    if device == "cpu":
        return "the processor"
    asked = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "a GPU"


class Worker:
    """A contestant's process, and its answers so far."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.role, self.label = ALL_CONTESTANTS[name]
        self.runs: list[dict[str, float]] = []
        self.facts: dict[str, int] = {}
        self.skipped: str | None = None
        needs = ["torch", "transformers"] + ["peft"] * ("PEFT" in self.label)
        missing = [package for package in needs if find_spec(package) is None]
        self._process: subprocess.Popen[str] | None = None
        if missing:
            self.skipped = f"not installed: {', '.join(missing)}"
            return
        job = json.dumps(options.job(name) | {"needs": needs})
        self._error = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        self._command = [sys.executable, "-m", "benchmarks.training.worker", job]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._error,
            text=True,
            env=os.environ | QUIET,
        )

    def wait_until_ready(self) -> None:
        """Waits until the worker has built its model and made its first steps."""
        self._read_answer()

    def take_turn(self, steps: int) -> None:
        """Lets the worker make ``steps`` steps."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
            return
        answer = self._read_answer()
        if answer:
            times = {"seconds": sum(answer.pop("seconds")), "cpu": answer.pop("cpu")}
            self.runs.append({name: round(total / steps, 6) for name, total in times.items()})
            self.facts = answer

    def _read_answer(self) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            return {}
        line = self._process.stdout.readline()
        if not line:
            self._fail()
            return {}
        return dict(json.loads(line))

    def _fail(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._error.seek(0)
        failure = CommandError(["worker", self.name], code, self._error.read())
        log(f"    {self.label}: {failure}")
        self.skipped = f"failed: {failure.reason}"
        self.runs = []
        self._process = None

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self.runs:
            middle = median(run["seconds"] for run in self.runs)
            peak = self.facts["peak"] / 1e6
            log(f"    {middle * 1e3:9.1f} ms  {peak:8.0f} MB  {self.label}")

    def result(self) -> dict[str, Any]:
        """The result as it is stored."""
        shown = {"id": self.name, "name": self.label, "role": self.role, "skipped": self.skipped}
        return shown | self.facts | {"runs": self.runs}
