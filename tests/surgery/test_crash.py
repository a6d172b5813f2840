"""Processes killed by SIGKILL at random moments: outputs are absent or whole, changes in place heal.

One server process imports the package and forks a child per run, so that a run costs what its verb
costs. The moment of the kill is drawn from a window that adapts itself, so that most kills come
while something is being written. ``NEFT_TORTURE=1000`` makes a thousand runs of each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support import raw_file, raw_folder, snapshot

import neftsurgery as ns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the server forks"),
]

RUNS = int(os.environ.get("NEFT_TORTURE", "60"))
REPOSITORY = Path(__file__).parents[2]

SERVER = """
import json, os, signal, sys, time
import neftsurgery as ns
verbs = {name: getattr(ns, name) for name in ("apply", "revert", "extract")}
ns.Selection.load, ns.Patch.load, ns.verify  # imported before the first fork
for line in sys.stdin:
    verb, arguments, options, kill_after = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            if "selection" in options:
                options["selection"] = ns.Selection.load(options["selection"])
            verbs[verb](*arguments, **options)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still this child's
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


class Runner:
    """Runs verbs in processes of their own, and kills them in an adaptive window of time."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        self.random = random.Random(0)
        self.low, self.high = 0.0, 0.0
        self.moments: Counter[str] = Counter()

    def run(self, verb: str, *arguments: object, kill_after: float | None = None, **options: object) -> int:
        """The exit status of a run: 0, 1, or -9."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        texts = [str(a) if isinstance(a, Path) else a for a in arguments]
        named = {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}
        self.server.stdin.write(json.dumps([verb, texts, named, kill_after]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def calibrate(self, verb: str, *arguments: object, **options: object) -> None:
        """One run that is left alone tells how long the window is."""
        start = time.perf_counter()
        assert self.run(verb, *arguments, **options) == 0
        self.low, self.high = 0.0, time.perf_counter() - start
        self.moments.clear()

    def kill(self, moment: Callable[[bool], str], verb: str, *arguments: object, **options: object) -> str:
        """A run that is killed; ``moment`` says of what is left whether it was early, midway or late."""
        delay = self.random.uniform(0.8 * self.low, 1.1 * self.high)
        status = self.run(verb, *arguments, kill_after=delay, **options)
        assert status in (0, -signal.SIGKILL), f"{verb} failed by itself"
        found = moment(status == 0)
        if found == "early":
            self.low += 0.3 * max(0.0, delay - self.low)
        elif found == "late":
            self.high -= 0.3 * max(0.0, self.high - delay)
        self.high = max(self.high, self.low + 1e-3)
        self.moments[found] += 1
        return found

    def report(self, what: str, record: Callable[[str, object], None]) -> None:
        """Tell how often the kills came while something was being written; far most should."""
        record(what, dict(self.moments))
        print(f"{what}: {dict(self.moments)}")
        assert self.moments["midway"] >= RUNS // 5, "too few kills came midway for this to mean much"


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.server.stdin.close()
    assert made.server.wait(30) == 0
    made.server.stdout.close()


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of 20 MB in three shards, with files beside the weights."""
    root = tmp_path_factory.mktemp("crash")
    rng = np.random.default_rng(0)
    base = {
        f"layers.{n}.weight": ("BF16", rng.integers(0, 1 << 14, (2048, 1280), np.uint16)) for n in range(4)
    }
    tuned = {name: (kind, bits ^ np.uint16(5)) for name, (kind, bits) in base.items()}
    config = {"model_type": "?"}
    return raw_folder(root / "base", base, 3, config), raw_folder(root / "tuned", tuned, 2, config)


@pytest.fixture(scope="module", params=[0, 1], ids=["rows", "columns"])
def patch(request: pytest.FixtureRequest, sides: tuple[Path, Path]) -> Path:
    """Half of the neurons of every tensor."""
    path = sides[0].parent / f"patch{request.param}"
    options = {"axis": {"*": request.param}, "per": "tensor", "score": "random", "reversible": True}
    ns.extract(*sides, neurons="50%", out=path, **options).close()
    return path


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_apply_to_a_new_output(
    runner: Runner,
    sides: tuple[Path, Path],
    patch: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    base, out = sides[0], tmp_path / "out"
    ns.apply(base, patch, out=tmp_path / "expected")
    expected, before = snapshot(tmp_path / "expected"), (snapshot(base), snapshot(patch))
    runner.calibrate("apply", base, patch, out=out)

    def moment(done: bool) -> str:
        if out.exists():
            assert snapshot(out) == expected
            return "late"
        assert not done
        return "midway" if hidden(tmp_path) else "early"

    for _ in range(RUNS):
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        if out.exists():
            out.rmdir()
        runner.kill(moment, "apply", base, patch, out=out)
        assert len(hidden(tmp_path)) <= 1, "what a killed run left is removed by the next"
    assert (snapshot(base), snapshot(patch)) == before
    runner.report(f"apply to a new folder, {patch.name}", record_property)
    assert runner.run("apply", base, patch, out=out, force=True) == 0
    assert snapshot(out) == expected
    assert hidden(tmp_path) == []


def test_replacing_an_output(
    runner: Runner,
    sides: tuple[Path, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """With --force OUT is the old one or the new one, and always there."""
    base, tuned = sides
    source = tuned / "model-00001-of-00002.safetensors"
    file = raw_file(tmp_path / "old", {"w": ("U8", np.zeros(9, "u1"))})
    old, out = file.read_bytes(), tmp_path / "out"
    patch = tmp_path / "patch"
    names = ["layers.0.*"]
    ns.extract(source, base, only=names, neurons="50%", score="random", out=patch).close()
    ns.apply(source, patch, out=tmp_path / "expected")
    new = (tmp_path / "expected").read_bytes()
    runner.calibrate("apply", source, patch, out=out)

    def moment(done: bool) -> str:
        content = out.read_bytes()
        if content == new:
            return "late"
        assert content == old
        assert not done
        return "midway" if hidden(tmp_path) else "early"

    for _ in range(RUNS):
        out.write_bytes(old)
        runner.kill(moment, "apply", source, patch, out=out, force=True)
    runner.report("apply over an old file", record_property)
    assert runner.run("apply", source, patch, out=out, force=True) == 0
    assert hidden(tmp_path) == []


def test_in_place(
    runner: Runner,
    sides: tuple[Path, Path],
    patch: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever state a kill leaves, the next command finds exactly the old or exactly the new one."""
    model = tmp_path / "model"
    ns.apply(sides[0], patch, out=tmp_path / "patched")
    ns.revert(tmp_path / "patched", patch, out=model)
    states = {"base": snapshot(model), "patched": snapshot(tmp_path / "patched")}
    runner.calibrate("apply", model, patch, in_place=True)
    now, torn, begun = "patched", 0, Counter[str]()
    for _ in range(2 * RUNS):
        verb, goal = ("apply", "patched") if now == "base" else ("revert", "base")

        def moment(done: bool, goal: str = goal, now: str = now) -> str:
            nonlocal torn
            files = {name: entry for name, entry in snapshot(model).items() if ".neft-" not in name}
            if (model / ".neft-journal").exists():
                assert not done
                torn += files not in states.values()
                return "midway"
            if files == states[goal]:
                return "late"
            assert files == states[now], "it was changed without a journal"
            begun["journal begun"] += bool(hidden(model))
            return "early"

        runner.kill(moment, verb, model, patch, in_place=True)
        found = ns.verify(model, patch).state
        assert found in states
        files = {name: entry for name, entry in snapshot(model).items() if not name.startswith("..neft-")}
        assert files == states[found]
        now = found
    runner.moments.update(begun)
    runner.report(f"in place, {patch.name}, {torn} of them half written", record_property)
    assert torn >= RUNS // 20
    if now == "base":
        ns.apply(model, patch, in_place=True)
    ns.revert(model, patch, in_place=True)
    assert snapshot(model) == states["base"], "no journal, no stale staging file"


def test_extract(
    runner: Runner,
    sides: tuple[Path, Path],
    patch: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    out, before = tmp_path / "out", (snapshot(sides[0]), snapshot(sides[1]))
    with ns.Patch.load(patch) as opened:
        opened.selection.save(tmp_path / "selection")
    ns.extract(
        *sides, ns.Selection.load(tmp_path / "selection"), reversible=True, out=tmp_path / "whole"
    ).close()
    expected = (tmp_path / "whole").read_bytes()
    arguments = ("extract", *sides)
    options = {"selection": tmp_path / "selection", "reversible": True, "out": out}
    runner.calibrate(*arguments, **options)

    def moment(done: bool) -> str:
        if out.exists():
            assert out.read_bytes() == expected
            return "late"
        assert not done
        return "midway" if hidden(tmp_path) else "early"

    for _ in range(RUNS):
        out.unlink(missing_ok=True)
        runner.kill(moment, *arguments, **options)
        assert len(hidden(tmp_path)) <= 1
    assert (snapshot(sides[0]), snapshot(sides[1])) == before
    runner.report(f"extract, {patch.name}", record_property)
    assert runner.run(*arguments, force=True, **options) == 0
    assert hidden(tmp_path) == []
