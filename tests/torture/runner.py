"""Runs commands in their own processes, and interrupts them with signals or failing system calls."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

__all__ = ["EVERY_CALL", "Call", "Fault", "Outcome", "Runner", "Style", "injector"]

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


class Call(IntFlag):
    """Kinds of system calls, as `faults.c` numbers them."""

    OPEN = 1
    READ = 2
    WRITE = 4
    SYNC = 8
    RENAME = 16
    RESIZE = 32
    COPY = 64
    UNLINK = 128
    MKDIR = 256
    MODE = 512
    STAT = 1024
    LOCK = 2048
    LIST = 4096
    MAP = 8192


EVERY_CALL = Call((1 << 14) - 1)


class Style(IntFlag):
    """How the chosen call fails, as `faults.c` numbers it."""

    ONCE = 0
    ONWARD = 1
    SHORT = 2
    END = 3
    SIGNAL = 4


@dataclass(frozen=True)
class Fault:
    """The ``nth`` call of ``kinds`` on a file under ``root`` fails."""

    root: Path
    kinds: Call
    nth: int
    style: Style = Style.ONCE
    number: int = 0

    def described(self) -> dict[str, Any]:
        return {
            "root": str(self.root),
            "kinds": int(self.kinds),
            "nth": self.nth,
            "style": int(self.style),
            "number": int(self.number),
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit status (negative: the signal's number), its output, calls seen and failed.

    ``peak`` is the most memory it had, in bytes, with what it shares with the server.
    """

    status: int
    out: str
    err: str
    seen: int
    hit: int
    peak: int


@functools.cache
def injector() -> Path | None:
    """The compiled library of `faults.c`; None without a compiler, or on other systems than Linux."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    made = Path(tempfile.mkdtemp(prefix="neft-faults-")) / "faults.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(HERE / "faults.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, check=False)
    return made if done.returncode == 0 else None


class Runner:
    """A server that forks (see `server.py`), and the window of time in which signals are most useful.

    The moment of a signal is drawn from a window that adapts, so that most signals arrive while the command
    writes something.
    """

    def __init__(self, *words: str, preload: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="neft-torture-"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["TMPDIR"] = str(self.folder)
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        self.random = random.Random(0)
        self.low, self.high = 0.0, 0.0
        self.moments: Counter[str] = Counter()
        assert self._receive() == "ready"

    def _receive(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def _request(self, job: dict[str, Any]) -> Outcome:
        assert self.server.stdin is not None
        logs = [self.folder / "out", self.folder / "err"]
        job["log"] = [str(log) for log in logs]
        self.server.stdin.write(json.dumps(job, default=str) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self._receive())
        out, err = (log.read_text() for log in logs)
        return Outcome(answer["status"], out, err, answer["seen"], answer["hit"], answer["peak"])

    def verb(
        self, verb: str, *arguments: object, after: float | None = None, signal: int = 9, **options: object
    ) -> Outcome:
        """A verb of the Python API."""
        job = {"verb": verb, "arguments": arguments, "options": options, "after": after, "signal": signal}
        return self._request(job)

    def command(
        self,
        *words: object,
        fault: Fault | None = None,
        after: float | None = None,
        signal: int = 9,
        environment: Mapping[str, str] | None = None,
        seconds: int | None = None,
        files: int | None = None,
        cwd: Path | None = None,
    ) -> Outcome:
        """A command line, in folder ``cwd``; SIGALRM ends it after ``seconds``, and it may open ``files``."""
        job: dict[str, Any] = {"words": [str(word) for word in words], "after": after, "signal": signal}
        job |= {"seconds": seconds, "files": files, "cwd": cwd}
        if fault is not None:
            job["fault"] = fault.described()
        return self._request(job | {"environment": dict(environment or {})})

    def calibrate(self, run: Callable[..., Outcome]) -> None:
        """Set the window's length from one uninterrupted run."""
        start = time.perf_counter()
        outcome = run()
        assert outcome.status == 0, outcome.err
        self.low, self.high = 0.0, time.perf_counter() - start
        self.moments.clear()

    def send_signal(
        self, run: Callable[..., Outcome], signal: int, moment: Callable[[Outcome], str]
    ) -> tuple[str, Outcome]:
        """Run and send a signal; ``moment`` judges from what is left whether it was early, midway or late."""
        delay = self.random.uniform(0.8 * self.low, 1.1 * self.high)
        outcome = run(after=delay, signal=signal)
        found = moment(outcome)
        if found == "early":
            self.low += 0.3 * max(0.0, delay - self.low)
        elif found == "late":
            self.high -= 0.3 * max(0.0, self.high - delay)
        self.high = max(self.high, self.low + 1e-3)
        self.moments[found] += 1
        return found, outcome

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        assert self.server.wait(60) == 0
        self.server.stdout.close()
        shutil.rmtree(self.folder)


@contextmanager
def running(*words: str, preload: Path | None = None) -> Iterator[Runner]:
    """A `Runner` that is closed at the end."""
    runner = Runner(*words, preload=preload)
    try:
        yield runner
    finally:
        runner.close()
