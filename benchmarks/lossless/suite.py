"""Runs the parts: the contestants take turns on one core, and each result is stored at once."""

from __future__ import annotations

import contextlib
import filecmp
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.harness.process import CommandError
from benchmarks.harness.sizes import format_size
from benchmarks.lossless import threads
from benchmarks.lossless.contestants import SLOW_BYTES, Contestant, Place, contestants
from benchmarks.lossless.entropy import information
from benchmarks.lossless.options import PARTS, RESULTS, Options
from benchmarks.lossless.pairs import (
    BOTH,
    CHECKPOINTS,
    FAST_RATE,
    PACKAGES,
    RL_RATE,
    RL_STEPS,
    SFT_RATE,
    Pair,
    pairs,
    trained,
    tuned_on,
)

SHOWN = (
    "neftsurgery",
    "numpy",
    "numba",
    "zstandard",
    "zipnn",
    "pyxdelta",
    "torch",
    "transformers",
    "peft",
    "gguf",
)
Result = dict[str, Any]


def measure(options: Options) -> None:
    """Measures the parts asked for; writes ``options.out/lossless.json``."""
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for part in options.only:
        start = time.perf_counter()
        log(f"{part}  (at {start - began:.0f} s)")
        here = machine.describe(options.work, SHOWN)
        absent = _absent(part)
        found = {"skipped": absent} if absent else MEASUREMENTS.get(part, _pairs)(part, options)
        today = datetime.now(UTC).date().isoformat()
        about = {"title": PARTS[part], "command": options.command(part), "date": today, "machine": here}
        results.store(options.out / RESULTS, part, about | found)
        log(f"  {part} took {time.perf_counter() - start:.0f} s")


def _absent(part: str) -> str | None:
    """Why a part cannot be measured."""
    if part == "textgenrnn":
        return None if CHECKPOINTS.exists() else "its checkpoints are not in ../shared/data"
    package = PACKAGES.get(part, PACKAGES["smollm2"])
    return None if find_spec(package) else f"the package {package.replace('_', '-')} is not installed"


def _pairs(part: str, options: Options) -> Result:
    found = list(pairs(part, options.work, options.steps))
    text = "" if part == "textgenrnn" else tuned_on(part)
    return {"text": text, "groups": [_group(pair, options.rounds, options.work) for pair in found]}


def _group(pair: Pair, rounds: int, work: Path) -> Result:
    nbytes = pair.tuned.stat().st_size
    log(f"  {pair.words}, {pair.dtype}, {format_size(nbytes)}")
    with tempfile.TemporaryDirectory(prefix="measured-", dir=work) as folder, one_core():
        place = Place.within(Path(folder))
        entries = [_Entry(one, pair, place) for one in contestants(pair, place)]
        for number in range(rounds):
            for entry in entries:
                entry.take_turn(number)
    found = {
        "kind": pair.kind,
        "dtype": pair.dtype,
        "label": pair.words,
        "bytes": nbytes,
        **information(pair.base, pair.tuned),
    }
    if pair.adapter:
        found["adapter"] = pair.adapter.stat().st_size
    for entry in entries:
        log(entry.line(nbytes))
    return found | {"contestants": [entry.result() for entry in entries]}


class _Entry:
    def __init__(self, contestant: Contestant, pair: Pair, place: Place) -> None:
        self._contestant, self._tuned = contestant, pair.tuned
        self._place, self._size = place, 0
        self._runs: list[Result] = []
        self.skipped = contestant.skipped
        if contestant.slow and pair.tuned.stat().st_size > SLOW_BYTES:
            self.skipped = f"slow, measured on files below {format_size(SLOW_BYTES)} only"

    def take_turn(self, number: int) -> None:
        one = self._contestant
        if self.skipped or (one.slow and number):
            return
        try:
            if not number and not one.slow:  # compiled, in the page cache, and checked below
                one.decode(one.encode())
            packed, into = _cost(one.encode)
            _, back = _cost(lambda: one.decode(packed))
        except CommandError as failure:
            self.skipped = f"failed: {failure.reason}"
            return
        except Exception as failure:  # of a rival's package: each has its own kind
            if one.role == "ours":
                raise
            self.skipped = f"failed: {failure or type(failure).__name__}"
            return
        self._runs.append({"encode": into, "decode": back})
        if one.memory:
            self._size = getattr(packed, "nbytes", None) or len(packed or b"")
        else:
            self._size = self._place.packed.stat().st_size
            if not filecmp.cmp(self._place.out, self._tuned, shallow=False):
                raise AssertionError(f"{one.name} does not give the tuned file back")

    def line(self, nbytes: int) -> str:
        if not self._runs:
            return f"    {self._contestant.name}: {self.skipped}"
        into, back = (nbytes / 1e6 / min(run[way] for run in self._runs) for way in ("encode", "decode"))
        share = 100 * self._size / nbytes
        return f"    {share:7.3f}%  {into:7.0f} MB/s in  {back:7.0f} MB/s out  {self._contestant.name}"

    def result(self) -> Result:
        one = self._contestant
        about = {"name": one.name, "role": one.role, "skipped": self.skipped}
        return about | {"size": self._size or None, "runs": self._runs}


def _cost(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and the processor time that it takes, that of the programs it runs included."""
    before = _processor_time()
    found = work()
    return found, round(_processor_time() - before, 6)


def _processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process and those that it starts stay on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _threads(part: str, options: Options) -> Result:
    pair = next(pairs("smollm2", options.work, options.steps))
    with tempfile.TemporaryDirectory(prefix="measured-", dir=options.work) as folder:
        return threads.measure(pair, options.rounds, Path(folder))


def _chain(part: str, options: Options) -> Result:
    saved = {1: BOTH} | {step: ["bf16"] for step in range(2, RL_STEPS + 1)}
    folder = trained(options.work, "smollm2", "rl", RL_RATE, saved)
    base = options.work / "smollm2" / "base-bf16.safetensors"
    files = [base, *(folder / f"{step}-bf16.safetensors" for step in range(1, RL_STEPS + 1))]
    links = [{"label": f"step {step}", **_sizes(*pair)} for step, pair in enumerate(pairwise(files), 1)]
    return {"rate": RL_RATE, "links": links, "whole": _sizes(base, files[-1])}


def _curve(part: str, options: Options) -> Result:
    base, lines = options.work / "smollm2" / "base-bf16.safetensors", []
    for rate in (SFT_RATE, FAST_RATE):
        first = {options.steps: BOTH} if rate == SFT_RATE else {}
        saved = {step: ["bf16"] for step in options.curve} | first
        folder = trained(options.work, "smollm2", "sft", rate, dict(sorted(saved.items())))
        points = [
            {"step": step, **_sizes(base, folder / f"{step}-bf16.safetensors")} for step in options.curve
        ]
        lines.append({"rate": rate, "points": points})
    return {"lines": lines}


def _sizes(base: Path, tuned: Path) -> Result:
    """Of the patches between two files, beside what changed."""
    import neftsurgery as ns

    with one_core():
        made = {
            name: ns.extract(base, tuned, lossless=True, fast=name == "fast", threads=1).nbytes
            for name in ("size", "fast")
        }
    found = {"bytes": tuned.stat().st_size, **made, **information(base, tuned)}
    log(f"    {100 * made['size'] / found['bytes']:.3f}%  {tuned.parent.name}/{tuned.name}")
    return found


MEASUREMENTS: dict[str, Callable[[str, Options], Result]] = {
    "threads": _threads,
    "chain": _chain,
    "curve": _curve,
}
