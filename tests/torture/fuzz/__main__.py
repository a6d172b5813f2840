"""``python -m tests.torture.fuzz --inputs 100000``: gives mutated files to every reader, in this process.

Fuzzing is guided by coverage. For some inputs the executed lines of the package are traced; an input that
reaches new lines, or is refused with a new message, is mutated further. The last line of standard output is
JSON. It names the inputs that broke a promise; ``--crashers`` is the folder they are in, and ``--replay``
reads one of them again.

``--only "lossless patch" --count 1000000 --processes 2 --record`` makes a million of one reader, in two
processes with a seed each, and puts the count into the page's table. The same seeds make the same inputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
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

from ..__main__ import FIGURES, PAGE, ROOT, join  # noqa: E402
from ..table import put_table  # noqa: E402
from .guard import Guard, limit_memory  # noqa: E402
from .target import Target  # noqa: E402
from .targets import targets  # noqa: E402

PACKAGE = os.path.dirname(neftsurgery.__file__)
MEMORY = 256 << 20
TRACED = 1000  # inputs whose lines are traced, at least; one in a hundred of fewer
WARM = 100
PROGRESS = 10  # seconds from one line to the next


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
        self.target, self.guard, self.crashers, self.seed = target, guard, crashers, seed
        self.random = random.Random(f"{seed} {target.name}")
        self.good, self.bad = list(target.seeds), list(target.seeds[:1])
        self.words: set[str] = set()
        self.lines: set[tuple[Any, int]] = set()
        self.result = Result(target.name)

    def run(self, inputs: int, seconds: float) -> Result:
        for seed in self.target.seeds:  # which also imports whatever is imported late
            self.target.path.write_bytes(seed)
            with self.guard.learning():
                self.target.read(seed)
        start = said = time.perf_counter()
        for number in range(inputs):
            now = time.perf_counter()
            if now - start > seconds or len(self.result.broken) >= 20:
                break
            if now - said > PROGRESS:
                said = now
                self.say(f"{number / inputs:.0%}, {number / (now - start):.0f} a second")
            some = self.good if self.random.random() < 0.7 else self.bad
            raw = self.random.choice(some)
            for _ in range(self.random.choice((1, 1, 1, 2))):
                raw = self.target.mutate(self.random, raw, some)
            self.one(raw, number, number < WARM or number % max(100, inputs // TRACED) == 0)
        self.result.corpus = len(self.good) + len(self.bad)
        self.result.seconds = round(time.perf_counter() - start, 1)
        self.say(f"in {self.result.seconds} s")
        return self.result

    def say(self, more: str) -> None:
        done = self.result
        counts = f"{done.inputs:,} inputs, {done.taken:,} taken, {len(done.broken)} broken"
        print(f"{done.target} (seed {self.seed}): {counts}, {more}", file=sys.stderr, flush=True)

    def one(self, raw: bytes, number: int, traced: bool) -> None:
        self.target.path.write_bytes(raw)
        known = len(self.lines)
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
        except self.target.refusals as error:
            str(error)
            return f"{type(error).__name__} {getattr(error, 'what', error)}"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000, help="of all targets together, also with --only")
    parser.add_argument("--count", type=int, help="instead: of each target")
    parser.add_argument("--seconds", type=float, default=36000, help="at most, of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target, by its name")
    parser.add_argument("--recipes", action="store_true", help="recipes too, which load transformers")
    parser.add_argument("--crashers", type=Path, default=Path("crashers"))
    parser.add_argument(
        "--processes", type=int, default=1, help="share the inputs; each has a seed of its own"
    )
    parser.add_argument("--record", action="store_true", help="put the counts into docs/guarantees.md")
    parser.add_argument("--replay", type=Path, help="only read this file, as the target --only")
    options = parser.parse_args()
    options.crashers = options.crashers.absolute()
    results = _shared(options) if options.processes > 1 else _here(options)
    if options.record:
        rows = [
            {
                "fault": "hostile file", "work": one["target"], "tried": one["inputs"],
                "losses": len(one["broken"]), "notes": {key: one[key] for key in ("taken", "refused")},
            }
            for one in results
        ]  # fmt: skip
        join(FIGURES, rows)
        put_table(PAGE, json.loads(FIGURES.read_text()))
    print(json.dumps(results))
    return any(one["broken"] for one in results)


def _shared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of several processes, added up by target."""
    parts = range(options.processes)
    counts = "count" if options.count else "inputs"
    share = -(-getattr(options, counts) // options.processes)
    words = [f"--{counts}={share}", f"--seconds={options.seconds}", f"--crashers={options.crashers}"]
    words += [f"--only={options.only}"] * (options.only is not None) + ["--recipes"] * options.recipes
    command = [sys.executable, "-m", "tests.torture.fuzz", *words]
    running = [
        subprocess.Popen([*command, f"--seed={options.seed + part}"], cwd=ROOT, stdout=subprocess.PIPE)
        for part in parts
    ]
    joined: dict[str, dict[str, Any]] = {}
    outputs = [one.communicate()[0] for one in running]
    if not all(outputs):
        sys.exit("one of the processes failed: see above")
    for output in outputs:
        for result in json.loads(output):
            known = joined.setdefault(result["target"], result)
            if known is not result:
                for key in ("inputs", "taken", "refused", "corpus", "broken"):
                    known[key] += result[key]
                for key in ("seconds", "slowest"):
                    known[key] = max(known[key], result[key])
    return list(joined.values())


def _here(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fuzz in this process, whose memory is limited from now on."""
    replayed = options.replay and options.replay.read_bytes()
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
            fuzzer = Fuzzer(target, guard, options.seed, options.crashers)
            if replayed is not None:
                target.path.write_bytes(replayed)
                print(fuzzer.read(replayed, False) or "taken", file=sys.stderr)
                continue
            inputs = options.count or max(1, round(options.inputs * target.share / total))
            results.append(vars(fuzzer.run(inputs, options.seconds)))
        return results
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
