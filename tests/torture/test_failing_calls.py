"""Every system call of every command fails once: exit 5, nothing half-written, nothing silently wrong.

`faults.c` is preloaded below the program. An uninterrupted run counts the calls that a command makes on its
files. Then one call fails, or all calls from one on, or a call moves half of its bytes, or a signal stops the
process just before it. A few hundred trials each reach every call; a test samples some.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import LLAMA_CONFIG, llama, snapshot, write_folder
from torture.runner import EVERY_CALL, Call, Fault, Outcome, Runner, Style
from torture.trials import TIMES, Trials, times

import neftsurgery as ns
from neftsurgery.checkpoint.healing import heal_recorded

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Work:
    """A command: its words (``@``: a file of the fixtures), its output, whether it changes ``model``."""

    words: tuple[str, ...]
    out: str | None = None
    changes: bool = False


WORKS = {
    "inspect": Work(("inspect", "@base")),
    "inspect patches": Work(("inspect", "@patch", "@second")),
    "inspect (lossless)": Work(("inspect", "@whole")),
    "verify": Work(("verify", "@base", "@patch", "--expect", "base")),
    "diff": Work(("diff", "@base", "@tuned", "-o", "@out"), "out"),
    "diff of an adapter": Work(("diff", "@base", "@adapter", "-o", "@out"), "out"),
    "select": Work(("select", "@scores", "--neurons", "9", "-o", "@out"), "out"),
    "extract": Work(("extract", "@base", "@tuned", "--neurons", "9", "--reversible", "-o", "@out"), "out"),
    "apply": Work(("apply", "@base", "@patch", "-o", "@out"), "out"),
    "apply to a file": Work(("apply", "@base/model.safetensors", "@patch", "-o", "@out"), "out"),
    "apply --force": Work(("apply", "@base", "@patch", "-o", "@old", "--force"), "old"),
    "apply --in-place": Work(("apply", "@model", "@patch", "--in-place"), changes=True),
    "revert": Work(("revert", "@patched", "@patch", "-o", "@out"), "out"),
    "revert --in-place": Work(("revert", "@model", "@patch", "--in-place"), changes=True),
    "apply --in-place (lossless)": Work(("apply", "@model", "@alike", "--in-place"), changes=True),
    "revert --in-place (lossless)": Work(("revert", "@model", "@alike", "--in-place"), changes=True),
    "merge --chain": Work(("merge", "--chain", "@alike", "--base", "@base", "-o", "@out"), "out"),
    "merge": Work(("merge", "@patch", "@second", "--on-overlap", "mean", "-o", "@out"), "out"),
    "report": Work(("report", "@scores", "-o", "@out"), "out"),
    "export": Work(("export", "@patch", "--to", "lora", "-o", "@out"), "out"),
    "extract --lossless": Work(
        ("extract", "@base", "@tuned", "--lossless", "--reversible", "-o", "@out"), "out"
    ),
    "apply (lossless)": Work(("apply", "@base", "@whole", "-o", "@out"), "out"),
    "revert (lossless)": Work(("revert", "@tuned", "@whole", "-o", "@out"), "out"),
    "verify (lossless)": Work(("verify", "@base", "@whole", "--expect", "base")),
}
INPUTS = (
    "base",
    "tuned",
    "patched",
    "adapter",
    "patch",
    "second",
    "whole",
    "alike",
    "likeness",
    "scores",
    "selection",
)


class Fixtures:
    """A folder with everything the commands read, and their state folder. It is restored after each trial."""

    def __init__(self, root: Path, runner: Runner) -> None:
        self.root, self.runner = root, runner
        self.environment = {"XDG_STATE_HOME": f"{root}/state"}
        base = llama(hidden=16, ffn=24, layers=1, vocabulary=8, seed=0)
        noise = np.random.default_rng(1)
        tuned = {
            name: (array + 1e-3 * noise.standard_normal(array.shape)).astype(np.float32)
            for name, array in base.items()
        }
        config = {**LLAMA_CONFIG, "hidden_size": 16}
        write_folder(root / "base", base, 1, config)
        write_folder(root / "tuned", tuned, 2, config)
        (root / "base" / "sub").mkdir()
        (root / "base" / "sub" / "tokenizer.json").write_text("{}")
        sides = (root / "base", root / "tuned")
        ns.diff(*sides, out=root / "scores").close()
        with ns.Scores.load(root / "scores") as scores:
            scores.select(neurons=12).save(root / "selection")
        ns.extract(*sides, ns.Selection.load(root / "selection"), reversible=True, out=root / "patch").close()
        ns.extract(*sides, neurons=9, policy="random", reversible=True, out=root / "second").close()
        ns.extract(*sides, lossless=True, reversible=True, out=root / "whole").close()
        ns.apply(root / "base", root / "patch", out=root / "patched")
        ns.export_lora(root / "patch", root / "adapter")
        sides = (root / "base", shutil.copytree(root / "patched", root / "likeness"))
        (sides[1] / "vocab.txt").write_text("a b c")
        ns.extract(*sides, lossless=True, reversible=True, out=root / "alike").close()
        self.states = {name: snapshot(root / name) for name in ("base", "patched", "likeness")}
        self.expected: dict[str, object] = {}
        self.answers: dict[str, str] = {}
        self.inputs = self.look()

    def look(self) -> dict[str, object]:
        return {name: snapshot(self.root / name) for name in INPUTS}

    def prepare(self, name: str) -> None:
        work, root = WORKS[name], self.root
        for one in ("out", "old", "model", "state"):
            shutil.rmtree(root / one, ignore_errors=True)
            if (root / one).exists():
                (root / one).unlink()
        if work.changes:
            changed = "likeness" if "lossless" in name else "patched"
            shutil.copytree(root / ("base" if name.startswith("apply") else changed), root / "model")
        if work.out == "old":
            (root / "old").mkdir()
            (root / "old" / "kept").write_text("old")
        for path in sorted(root.rglob("*")):
            if ".neft-" in path.name and path.exists():  # of a trial that has failed already
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.root.rglob("*") if ".neft-" in path.name)

    def run(self, name: str, fault: Fault | None) -> Outcome:
        words = *self.words(name), "--threads", "2"
        return self.runner.command(*words, fault=fault, environment=self.environment)

    def words(self, name: str) -> list[str]:
        return [f"{self.root}/{word[1:]}" if word[0] == "@" else word for word in WORKS[name].words]

    def learn(self, name: str, kinds: Call | None = None) -> int:
        """Run it without a fault: how many calls it makes, and its result."""
        self.prepare(name)
        outcome = self.run(name, None if kinds is None else Fault(self.root, kinds, 1 << 40))
        assert outcome.status == 0, outcome.err
        assert outcome.hit == 0
        work = WORKS[name]
        self.answers[name] = outcome.out
        if work.out is not None:
            self.expected[name] = snapshot(self.root / work.out)
        return outcome.seen

    def judge(self, name: str, outcome: Outcome, exits: tuple[int, ...]) -> None:
        """Check the promises, whatever went wrong."""
        work, said = WORKS[name], outcome.err
        assert outcome.status in (0, *exits), f"exit {outcome.status}: {said}"
        assert "Traceback" not in said, said
        assert "internal error" not in said, said
        if outcome.status > 0:
            assert 1 <= said.count("\n") <= 6, said
        if outcome.status == 5:
            (message,) = [line for line in said.splitlines() if line.startswith("neftsurgery:")]
            assert str(self.root) in message or "state folder" in message, f"no file is named: {said}"
            assert ".neft-" not in message.replace("neft-journal", ""), f"a name that nobody knows: {said}"
        if outcome.status == 0 and "there is no config.json" in said:
            return  # it vanished, it is said, and it is not needed
        if outcome.status == 0 and work.out is None and not work.changes:
            assert outcome.out == self.answers[name], "it says something else"
        if work.out is not None:
            self.judge_output(name, work.out, outcome.status == 0)
        if work.changes:
            self.judge_change(name, outcome.status == 0, "patched" if name.startswith("apply") else "base")
        assert self.look() == self.inputs, "an input changed"

    def judge_output(self, name: str, out: str, done: bool) -> None:
        path = self.root / out
        there = path.exists() and (out != "old" or not (path / "kept").exists())
        assert there or not done, "it says that it is done, and there is nothing"
        if there:
            assert snapshot(path) == self.expected[name], "half written, or wrong"
        elif out == "old":
            assert path.exists(), "the old output is gone"

    def judge_change(self, name: str, done: bool, goal: str) -> None:
        model = self.root / "model"
        if heal_recorded(model) is not None:
            assert not done, "it says that it is done, and its journal is there"
        state = ns.verify(model, self.root / "patch").state
        assert state == goal or not done, "it says that it is done, and it is not"
        left = {key: entry for key, entry in snapshot(model).items() if not key.startswith("..neft-")}
        whole = "likeness" if "lossless" in name and state == "patched" else state
        assert left == self.states[whole], "neither the old nor the new one"

    def clean(self, name: str, tolerate: bool) -> None:
        """What a fault left behind is recognised: the next run of the command removes it."""
        if self.leftovers():
            assert tolerate, f"left behind: {self.leftovers()}"
            if WORKS[name].changes:  # stale journals are found when a journal is written
                ns.apply(self.root / "model", self.root / "patch", in_place=True)
                ns.revert(self.root / "model", self.root / "patch", in_place=True)
            else:
                words = () if "--force" in WORKS[name].words else ("--force",)
                self.run_more(name, *words)
            assert self.leftovers() == []

    def run_more(self, name: str, *more: str) -> None:
        outcome = self.runner.command(*self.words(name), *more, environment=self.environment)
        assert outcome.status == 0, outcome.err


@pytest.fixture(scope="module")
def fixtures(faulty: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixtures]:
    made = Fixtures(tmp_path_factory.mktemp("fixtures"), faulty)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        yield made


CHANGING = Call.WRITE | Call.SYNC | Call.RENAME | Call.RESIZE | Call.COPY | Call.MKDIR | Call.MODE
ON_DESCRIPTORS = Call.READ | Call.WRITE | Call.SYNC | Call.RESIZE | Call.COPY | Call.MODE | Call.MAP
ASKING = Call.OPEN | Call.READ | Call.STAT | Call.LIST | Call.MAP


@dataclass(frozen=True)
class Failure:
    """How a call fails, which kinds of calls fail, and which exit codes may follow."""

    kinds: Call
    style: Style
    number: int
    exits: tuple[int, ...] = (5,)
    leaves: bool = False


FAILURES = {
    "disk full (ENOSPC), from a call on": Failure(CHANGING, Style.ONWARD, errno.ENOSPC),
    "disk full (ENOSPC), once": Failure(CHANGING, Style.ONCE, errno.ENOSPC),
    "quota (EDQUOT), from a call on": Failure(CHANGING, Style.ONWARD, errno.EDQUOT),
    "read-only (EROFS), from a call on": Failure(
        CHANGING | Call.UNLINK, Style.ONWARD, errno.EROFS, leaves=True
    ),
    "write error (EIO), once": Failure(CHANGING, Style.ONCE, errno.EIO),
    "write error (EIO), from a call on": Failure(
        CHANGING | Call.UNLINK, Style.ONWARD, errno.EIO, leaves=True
    ),
    "fsync fails (EIO)": Failure(Call.SYNC, Style.ONCE, errno.EIO),
    "rename fails (EIO)": Failure(Call.RENAME, Style.ONCE, errno.EIO),
    "removing fails (EIO)": Failure(Call.UNLINK, Style.ONCE, errno.EIO, leaves=True),
    "read error (EIO), once": Failure(ASKING, Style.ONCE, errno.EIO),
    "read error (EIO), from a call on": Failure(ASKING, Style.ONWARD, errno.EIO, leaves=True),
    "no more descriptors (EMFILE)": Failure(Call.OPEN | Call.MAP, Style.ONWARD, errno.EMFILE, leaves=True),
    "no locks (ENOLCK)": Failure(Call.LOCK, Style.ONWARD, errno.ENOLCK, leaves=True),
    "network share gone (ESTALE), from a call on": Failure(
        EVERY_CALL, Style.ONWARD, errno.ESTALE, leaves=True
    ),
    "vanished (ENOENT), from a call on": Failure(
        ASKING | CHANGING | Call.UNLINK, Style.ONWARD, errno.ENOENT, (2, 3, 4, 5), leaves=True
    ),
    "short read or write": Failure(Call.READ | Call.WRITE | Call.COPY, Style.SHORT, 0, ()),
    "file ends too soon": Failure(Call.READ, Style.END, 0, (3, 4, 5)),
    "descriptors closed (EBADF), from a call on": Failure(ON_DESCRIPTORS, Style.ONWARD, errno.EBADF),
    "copy_file_range fails (EIO), from a call on": Failure(Call.COPY, Style.ONWARD, errno.EIO, ()),
    "copy_file_range fails (ENOSYS), from a call on": Failure(Call.COPY, Style.ONWARD, errno.ENOSYS, ()),
    "copy_file_range fails (EXDEV), once": Failure(Call.COPY, Style.ONCE, errno.EXDEV, ()),
    "copy_file_range copies nothing": Failure(Call.COPY, Style.END, 0, ()),
    "SIGKILL before a call": Failure(EVERY_CALL, Style.SIGNAL, signal.SIGKILL, (-9,), leaves=True),
    "SIGINT before a call": Failure(EVERY_CALL, Style.SIGNAL, signal.SIGINT, (130,)),
    "SIGTERM before a call": Failure(EVERY_CALL, Style.SIGNAL, signal.SIGTERM, (143,)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_call_goes_wrong(fixtures: Fixtures, trials: Trials, failure: str) -> None:
    works = list(WORKS) if TIMES else random.Random(failure).sample(list(WORKS), 3)
    for name in works:
        try_calls(fixtures, trials, name, failure)


def try_calls(fixtures: Fixtures, trials: Trials, name: str, failure: str) -> None:
    """Let some of the calls of one command fail, one in each run."""
    kind = FAILURES[failure]
    calls = fixtures.learn(name, kind.kinds)
    chosen = random.Random(f"{name} {failure}").sample(range(calls), min(calls, times(2)))
    for nth in sorted(chosen):
        fixtures.prepare(name)
        with trials.trial(failure, name):
            fault = Fault(fixtures.root, kind.kinds, nth, kind.style, kind.number)
            outcome = fixtures.run(name, fault)
            try:
                fixtures.judge(name, outcome, kind.exits)
                fixtures.clean(name, kind.leaves)
            except BaseException as error:
                error.add_note(f"{name}: call {nth} of {calls}; exit {outcome.status}; {outcome.err}")
                raise
