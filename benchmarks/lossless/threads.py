"""Two threads beside two independent processes: wall time of the same work, on two cores.

``python -m benchmarks.lossless.threads VERB BASE TUNED FOLDER CORES`` is a worker, with a thread for each
core: it does the work once, says so, and does it again for every line that it reads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET
from benchmarks.lossless.contestants import Place
from benchmarks.lossless.pairs import Pair

VERBS = ("extract", "apply")


def measure(pair: Pair, rounds: int, folder: Path) -> dict[str, Any]:
    """Runs of both verbs, in turns: one worker of two threads, then two of one thread at the same time."""
    cores = sorted(os.sched_getaffinity(0))[-2:]
    if len(cores) < 2:
        return {"skipped": "this machine has one core"}
    found = []
    for verb in VERBS:
        with ExitStack() as stack:
            both = stack.enter_context(_worker(verb, pair, folder / "both", cores))
            alone = [stack.enter_context(_worker(verb, pair, folder / str(core), [core])) for core in cores]
            runs = [{"threads": _seconds([both]), "processes": _seconds(alone)} for _ in range(rounds)]
        log(f"    {verb}: {runs}")
        found.append({"name": verb, "runs": runs})
    return {"label": pair.words, "bytes": pair.tuned.stat().st_size, "verbs": found}


@contextmanager
def _worker(verb: str, pair: Pair, folder: Path, cores: list[int]) -> Iterator[subprocess.Popen[str]]:
    words = [verb, str(pair.base), str(pair.tuned), str(folder), ",".join(map(str, cores))]
    command = [sys.executable, "-m", "benchmarks.lossless.threads", *words]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | QUIET, **pipes) as worker:
        _answer(worker)
        yield worker
        assert worker.stdin is not None
        worker.stdin.close()


def _seconds(workers: list[subprocess.Popen[str]]) -> float:
    """Wall time until the last of the workers is through."""
    began = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        print(file=worker.stdin, flush=True)
    for worker in workers:
        _answer(worker)
    return round(time.perf_counter() - began, 4)


def _answer(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    if not worker.stdout.readline():
        sys.exit("a worker has failed")


def _main(verb: str, base: str, tuned: str, folder: str, cores: str) -> None:
    import neftsurgery as ns

    used = {int(core) for core in cores.split(",")}
    os.sched_setaffinity(0, used)
    place, how = Place.within(Path(folder)), {"force": True, "threads": len(used)}
    ways: dict[str, Callable[[], object]] = {
        "extract": lambda: ns.extract(base, tuned, lossless=True, out=place.packed, **how),
        "apply": lambda: ns.apply(base, place.packed, out=place.out, **how),
    }
    for one in VERBS[: VERBS.index(verb) + 1]:
        ways[one]()
    print("ready", flush=True)
    for _ in sys.stdin:
        ways[verb]()
        print("done", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
