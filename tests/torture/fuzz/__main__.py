"""``python -m tests.torture.fuzz --inputs 100000``: gives mutated files to every reader, in this process.

Fuzzing is guided by coverage. For some inputs the executed lines of the package are traced; an input that
reaches new lines, or is refused with a new message, is mutated further. The last line of standard output is
JSON. It names the folder with the inputs that broke a promise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import neftsurgery  # noqa: E402
from neftsurgery.errors import NeftError  # noqa: E402

from .guard import Guard, limit_memory  # noqa: E402
from .targets import Target, targets  # noqa: E402

PACKAGE = os.path.dirname(neftsurgery.__file__)
MEMORY = 256 << 20
TRACED = 100  # every so many inputs
WARM = 100


@dataclass
class Result:
    """The result of one target."""

    target: str
    inputs: int = 0
    taken: int = 0
    refused: int = 0
    corpus: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    broken: list[dict[str, str]] = field(default_factory=list)


class Fuzzer:
    def __init__(self, target: Target, guard: Guard, seed: int, crashers: Path) -> None:
        self.target, self.guard, self.crashers = target, guard, crashers
        self.random = random.Random(f"{seed} {target.name}")
        self.good, self.bad = list(target.seeds), list(target.seeds[:1])
        self.words: set[str] = set()
        self.lines: set[tuple[Any, int]] = set()
        self.result = Result(target.name)

    def run(self, inputs: int, seconds: float) -> Result:
        start = time.perf_counter()
        for seed in self.target.seeds:  # which also imports whatever is imported late
            self.target.path.write_bytes(seed)
            with self.guard.learning():
                self.target.read(seed)
        for number in range(inputs):
            if time.perf_counter() - start > seconds or len(self.result.broken) >= 20:
                break
            some = self.good if self.random.random() < 0.7 else self.bad
            raw = self.random.choice(some)
            for _ in range(self.random.choice((1, 1, 1, 2))):
                raw = self.target.mutate(self.random, raw, some)
            self.one(raw, number)
        self.result.corpus = len(self.good) + len(self.bad)
        self.result.seconds = round(time.perf_counter() - start, 1)
        return self.result

    def one(self, raw: bytes, number: int) -> None:
        self.target.path.write_bytes(raw)
        known = len(self.lines)
        traced = number % TRACED == 0 or number < WARM
        began = time.perf_counter()
        try:
            # The first inputs reach what is imported or compiled late: that is the package's own code.
            if number < WARM:
                outcome = self.read(raw, traced)
            else:
                with self.guard.watching():
                    outcome = self.read(raw, traced)
        except Exception as error:
            self.broke(raw, error)
            return
        self.result.slowest = max(self.result.slowest, round(time.perf_counter() - began, 3))
        self.result.inputs += 1
        if outcome is None:
            self.result.taken += 1
        else:
            self.result.refused += 1
        words = "taken" if outcome is None else re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "_", outcome)[:200]
        if words not in self.words or len(self.lines) > known:
            self.words.add(words)
            some = self.good if outcome is None else self.bad
            if len(raw) < 20_000 and len(some) < 2000:
                some.append(raw)

    def read(self, raw: bytes, traced: bool) -> str | None:
        if traced:
            sys.settrace(self.trace)
        try:
            self.target.read(raw)
        except NeftError as error:
            str(error)
            return f"{type(error).__name__} {error.what}"
        finally:
            sys.settrace(None)
        return None

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        lines, code = self.lines, frame.f_code

        def line(frame: FrameType, event: str, argument: object) -> Any:
            lines.add((code, frame.f_lineno))
            return line

        return line

    def broke(self, raw: bytes, error: BaseException) -> None:
        self.result.inputs += 1
        name = f"{self.target.name.replace(' ', '-')}-{hashlib.sha256(raw).hexdigest()[:12]}"
        self.crashers.mkdir(parents=True, exist_ok=True)
        (self.crashers / name).write_bytes(raw)
        text = "".join(traceback.format_exception(error)[-4:])
        self.result.broken.append({"input": name, "error": text[-1500:]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000, help="of all targets together, also with --only")
    parser.add_argument("--seconds", type=float, default=3600, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target, by its name")
    parser.add_argument("--recipes", action="store_true", help="recipes too, which load transformers")
    parser.add_argument("--crashers", type=Path, default=Path("crashers"))
    options = parser.parse_args()
    options.crashers = options.crashers.absolute()
    shm = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="neft-fuzz-", dir=shm if shm.is_dir() else None))
    os.environ["TMPDIR"] = tempfile.tempdir = str(root)
    os.environ["XDG_STATE_HOME"] = str(root / "state")
    os.chdir(root)  # a file that is changed is opened step by step, by names that are relative to a folder
    try:
        every = list(targets(root, recipes=options.recipes))
        total = sum(one.share for one in every)
        chosen = [one for one in every if options.only in (None, one.name)]
        warnings.simplefilter("error")  # numpy's are no words for users
        guard = Guard(root)
        limit_memory(MEMORY)
        results = []
        for target in chosen:
            inputs = max(1, round(options.inputs * target.share / total))
            result = Fuzzer(target, guard, options.seed, options.crashers).run(inputs, options.seconds)
            results.append(result)
            print(
                f"{result.target}: {result.inputs} inputs in {result.seconds} s, {result.taken} taken, "
                f"{len(result.broken)} broken",
                file=sys.stderr,
            )
        print(json.dumps([vars(result) for result in results]))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
