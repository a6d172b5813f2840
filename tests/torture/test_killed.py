"""Processes stopped by signals at random moments: outputs are absent or whole, changes in place heal.

``NEFT_TORTURE=1000`` makes a thousand runs of each kind (see `torture.trials`).
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import raw_file, snapshot
from torture.runner import Outcome, Runner
from torture.trials import Trials, times

import neftsurgery as ns
from neftsurgery.checkpoint.healing import heal_recorded

pytestmark = pytest.mark.slow

SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
RUNS = times(3)


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_end(outcome: Outcome, number: int) -> None:
    """The command finished, or it was stopped and said so in one line."""
    assert outcome.status in (0, -number, *([128 + number] if number != signal.SIGKILL else [])), outcome.err
    assert "Traceback" not in outcome.err
    if outcome.status > 0:
        assert outcome.err.count("neftsurgery: interrupted") == 1


def tries(runner: Runner, enough: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """As many tries as asked for, and more until a fifth of the signals arrived during a write.

    Signals that all arrive too early or too late would prove nothing. ``enough`` may ask for more.
    """
    for count in range(100 + 20 * RUNS):
        if count >= RUNS and runner.moments["midway"] > RUNS // 5 and enough():
            return
        yield
    pytest.fail(f"too few came midway: {dict(runner.moments)}")


@dataclass(frozen=True)
class Work:
    """A command that writes ``out``, and everything it reads."""

    words: tuple[object, ...]
    inputs: tuple[Path, ...]


@pytest.fixture(scope="module")
def works(sides: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """Every command that writes a new output, by name; files of 5 to 25 MB."""
    root = tmp_path_factory.mktemp("works")
    base, tuned = sides
    common = {"per": "tensor", "score": "random", "reversible": True}
    rows, columns, few = root / "rows", root / "columns", root / "few"
    ns.extract(*sides, neurons="50%", out=rows, **common).close()
    ns.extract(*sides, neurons="50%", out=columns, axis={"*": 1}, **common).close()
    ns.extract(*sides, neurons="6%", out=few, seed=1, **common).close()
    with ns.Patch.load(rows) as opened:
        opened.selection.save(root / "selection")
    ns.apply(base, rows, out=root / "patched")
    ns.extract(*sides, lossless=True, reversible=True, out=root / "whole").close()
    return {
        "apply": Work(("apply", base, rows), (base, rows)),
        "apply (columns)": Work(("apply", base, columns), (base, columns)),
        "revert": Work(("revert", root / "patched", rows), (root / "patched", rows)),
        "extract": Work(
            ("extract", base, tuned, "--selection", root / "selection", "--reversible"),
            (base, tuned, root / "selection"),
        ),
        "merge": Work(("merge", rows, few, "--on-overlap", "mean"), (rows, few)),
        "export": Work(("export", few, "--to", "lora"), (few,)),
        "extract --lossless": Work(("extract", base, tuned, "--lossless", "--reversible"), (base, tuned)),
        "apply (lossless)": Work(("apply", base, root / "whole"), (base, root / "whole")),
        "revert (lossless)": Work(("revert", tuned, root / "whole"), (tuned, root / "whole")),
    }


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "name",
    [
        "apply", "apply (columns)", "revert", "extract", "merge", "export",
        "extract --lossless", "apply (lossless)", "revert (lossless)",
    ],
)  # fmt: skip
def test_a_new_output_is_absent_or_whole(
    runner: Runner, trials: Trials, works: dict[str, Work], tmp_path: Path, name: str, number: signal.Signals
) -> None:
    work, out = works[name], tmp_path / "out"
    run = functools.partial(runner.command, *work.words, "-o", out)
    runner.calibrate(run)
    expected, before = snapshot(out), [snapshot(path) for path in work.inputs]

    def moment(outcome: Outcome) -> str:
        if out.exists():
            assert snapshot(out) == expected, "half written"
            return "late"
        assert outcome.status != 0
        return "midway" if outcome.status > 0 or hidden(tmp_path) else "early"

    for _ in tries(runner):
        remove(out)
        with trials.trial(number.name, name) as entry:
            found, outcome = runner.send_signal(run, number, moment)
            entry.notes[found] = entry.notes.get(found, 0) + 1
            check_end(outcome, number)
            # What SIGKILL left is removed by the next run; the other signals leave nothing.
            assert len(hidden(tmp_path)) <= (outcome.status == -signal.SIGKILL)
    with trials.trial(number.name, name):
        outcome = run_again(run, out)
        assert outcome.status == 0, outcome.err
        assert snapshot(out) == expected
        assert hidden(tmp_path) == [], "what was left is recognised, and cleaned up"
        assert [snapshot(path) for path in work.inputs] == before, "an input changed"


def run_again(run: Callable[..., Outcome], out: Path) -> Outcome:
    remove(out)
    return run()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_replacing_an_output(
    runner: Runner, trials: Trials, sides: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """With --force, OUT is always there, and is the old one or the new one."""
    base, tuned = sides
    source = tuned / "model-00001-of-00002.safetensors"
    file = raw_file(tmp_path / "old", {"w": ("U8", np.zeros(9, "u1"))})
    old, out, patch = file.read_bytes(), tmp_path / "out", tmp_path / "patch"
    ns.extract(source, base, only=["layers.0.*"], neurons="50%", score="random", out=patch).close()
    run = functools.partial(runner.command, "apply", source, patch, "-o", out, "--force")
    runner.calibrate(run)
    new = out.read_bytes()

    def moment(outcome: Outcome) -> str:
        content = out.read_bytes()
        if content == new:
            return "late"
        assert content == old
        assert outcome.status != 0
        return "midway" if outcome.status > 0 or hidden(tmp_path) else "early"

    for _ in tries(runner):
        out.write_bytes(old)
        with trials.trial(number.name, "apply --force"):
            _, outcome = runner.send_signal(run, number, moment)
            check_end(outcome, number)
    assert run().status == 0
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_in_place(
    runner: Runner,
    trials: Trials,
    sides: tuple[Path, Path],
    patch: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """Whatever a signal leaves, the next command finds exactly the old or exactly the new checkpoint."""
    model = tmp_path / "model"
    ns.apply(sides[0], patch, out=tmp_path / "patched")
    ns.revert(tmp_path / "patched", patch, out=model)
    states = {"base": snapshot(model), "patched": snapshot(tmp_path / "patched")}
    runner.calibrate(functools.partial(runner.command, "apply", model, patch, "--in-place"))
    now, torn = "patched", 0
    # Of the kills that leave a journal, some must come between two writes.
    for _ in tries(runner, lambda: number != signal.SIGKILL or torn > RUNS // 40):
        verb, goal = ("apply", "patched") if now == "base" else ("revert", "base")
        run = functools.partial(runner.command, verb, model, patch, "--in-place")

        def moment(outcome: Outcome, goal: str = goal, now: str = now) -> str:
            nonlocal torn
            files = {name: entry for name, entry in snapshot(model).items() if ".neft-" not in name}
            if (model / ".neft-journal").exists():
                assert outcome.status == -signal.SIGKILL, "a signal that can be caught undoes at once"
                torn += files not in states.values()
                return "midway"
            if files == states[goal]:
                return "late"
            assert files == states[now], "it was changed without a journal"
            return "midway" if outcome.status > 0 else "early"

        kind = " (lossless)" if patch.name == "patchNone" else ""
        with trials.trial(number.name, f"{verb} --in-place{kind}") as entry:
            found, outcome = runner.send_signal(run, number, moment)
            entry.notes[found] = entry.notes.get(found, 0) + 1
            check_end(outcome, number)
            if (model / ".neft-journal").exists():
                assert runner.command("verify", model, patch).status == 5, "a command that reads never heals"
                # By whoever asks, or by the next command that changes it: what a kill leaves is recorded.
                if entry.notes[found] % 2:
                    assert runner.command("heal", model, "--yes").status == 0
                else:
                    assert heal_recorded(model) is not None
            state = ns.verify(model, patch).state
            assert state in states
            assert not (model / ".neft-journal").exists()
            left = {name: entry for name, entry in snapshot(model).items() if ".neft-" not in name}
            assert left == states[state], "it did not heal"
        now = state
    if now == "base":
        ns.apply(model, patch, in_place=True)
    ns.revert(model, patch, in_place=True)
    assert snapshot(model) == states["base"], "no journal, no stale staging file"
