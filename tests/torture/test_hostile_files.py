"""Journals and JSON of strangers, few or closed descriptors, and outputs where no file can be."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile.test_planted_journals import ATTACKS, COMMANDS, JOURNAL_NAME, NO_DRY_RUN, everything, setting
from support import raw_file
from torture.bombs import BOMBS
from torture.fuzz.mutate import mutate_safetensors
from torture.runner import Outcome, Runner
from torture.test_failing_calls import WORKS, Fixtures
from torture.trials import TIMES, Trials, times

pytestmark = pytest.mark.slow
__all__ = ["setting"]
SECONDS = 300  # a run that takes longer hangs


@pytest.fixture(scope="module")
def fixtures(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    return Fixtures(tmp_path_factory.mktemp("fixtures"), runner)


def check(outcome: Outcome, *exits: int) -> None:
    assert outcome.status != -signal.SIGALRM, "it hangs"
    assert outcome.status in exits, f"exit {outcome.status}: {outcome.err}"
    assert "Traceback" not in outcome.err
    assert "internal error" not in outcome.err


# --- JSON


def as_file(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


def as_header(path: Path, raw: bytes) -> None:
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


def as_metadata(path: Path, raw: bytes) -> None:
    raw_file(path, {"w": ("U8", np.zeros(1, "u1"))}, {"a": raw.decode()})


def as_document(key: str) -> Callable[[Path, bytes], None]:
    def write(path: Path, raw: bytes) -> None:
        text = f'{{"version":1,"tensors":{raw.decode()}}}'
        raw_file(path, {"w": ("U8", np.zeros(1, "u1"))}, {key: text})

    return write


#: Where the JSON stands, how it is written there, and the command that reads it; all in a copy of a folder.
PLACES: dict[str, tuple[str, Callable[[Path, bytes], None], tuple[str, ...]]] = {
    "config.json": ("base/config.json", as_file, ("diff", "base", "tuned")),
    "index": ("tuned/model.safetensors.index.json", as_file, ("inspect", "tuned")),
    "adapter config": ("adapter/adapter_config.json", as_file, ("diff", "base", "adapter")),
    "header": ("base/model.safetensors", as_header, ("inspect", "base")),
    "metadata": ("base/model.safetensors", as_metadata, ("inspect", "base")),
    "patch": ("patch", as_document("neuron_patch"), ("verify", "base", "patch")),
    "scores": ("scores", as_document("neuron_scores"), ("select", "scores", "--neurons", "3", "-o", "out")),
    "selection": ("selection", as_document("neuron_selection"), ("inspect", "selection")),
    "journal": (f"base/{JOURNAL_NAME}", as_document("neft_journal"), ("heal", "base", "--yes")),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_stays_in_proportion_to_json(
    fixtures: Fixtures, runner: Runner, trials: Trials, tmp_path: Path, place: str
) -> None:
    """Any JSON at any size up to what a header may have: at most 100 MB more than 24 times its bytes."""
    rng = random.Random(place)
    plain = runner.command("inspect", fixtures.root / "base").peak
    names = [*BOMBS] if TIMES else rng.sample([*BOMBS], 4)
    for name in itertools.islice(itertools.cycle(names), times(len(names))):
        root = tmp_path / "root"
        shutil.copytree(fixtures.root, root)
        file, write, words = PLACES[place]
        nbytes = int(10 ** rng.uniform(5, 7.96 if TIMES else 6.6))
        write(root / file, BOMBS[name](nbytes))
        with trials.trial("JSON of many or long values", place):
            outcome = runner.command(*words, cwd=root, seconds=SECONDS)
            check(outcome, 0, 3, 4)
            size = (root / file).stat().st_size
            assert outcome.peak - plain < 100e6 + 24 * size, (
                f"{name}: {(outcome.peak - plain) / size:.0f} times"
            )
        shutil.rmtree(root)


# --- journals


def damaged(journal: Path, rng: random.Random) -> None:
    raw = mutate_safetensors(rng, journal.read_bytes(), [])
    journal.write_bytes(raw)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_planted_journal_is_not_followed(
    runner: Runner, trials: Trials, setting: Path, attack: Callable[[Path, Path], Path]
) -> None:
    """Whole or damaged, with every command: nothing is changed, and only ``inspect`` goes on."""
    rng = random.Random(attack.__name__)
    commands = [*COMMANDS.keys() - {"train", "report"}]  # those load torch
    for _ in range(times(3)):
        model = attack(setting / "attacker", setting / "victim")
        name = rng.choice(sorted(commands))
        if rng.random() < 0.5:
            damaged(next(setting.rglob(f"*{JOURNAL_NAME}")), rng)
        before = everything(setting)
        words = [word.replace("MODEL", str(model)) for word in COMMANDS[name]]
        if name not in NO_DRY_RUN and rng.random() < 0.3:
            words.append("--dry-run")
        with trials.trial("planted journal", name):
            outcome = runner.command(*words, cwd=setting, seconds=SECONDS)
            check(outcome, *([0] if name == "inspect" else [2, 4, 5]))
            assert everything(setting) == before, "a byte was changed"
        shutil.rmtree(setting / "attacker")
        (setting / "attacker").mkdir()


# --- descriptors


@pytest.mark.parametrize("name", WORKS)
def test_few_descriptors(fixtures: Fixtures, runner: Runner, trials: Trials, name: str) -> None:
    rng = random.Random(name)
    fixtures.learn(name)
    for _ in range(times(2)):
        fixtures.prepare(name)
        files = rng.randrange(12, 40)
        with trials.trial("few descriptors (RLIMIT_NOFILE)", name):
            outcome = runner.command(*fixtures.words(name), files=files, seconds=SECONDS)
            fixtures.judge(name, outcome, (5,))
            fixtures.clean(name, False)


#: As a shell redirects them.
CLOSED = {
    "stdin is closed": "<&-",
    "stdout is closed": ">&-",
    "stderr is closed": "2>&-",
    "stdout and stderr are closed": ">&- 2>&-",
    "all are closed": "<&- >&- 2>&-",
    "stdout is full": ">/dev/full",
    "stderr is full": "2>/dev/full",
}


def closed_runs(rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        yield rng.choice([*WORKS]), rng.choice([*CLOSED])


def test_closed_descriptors(fixtures: Fixtures, trials: Trials, tmp_path: Path) -> None:
    """The numbers 0, 1 and 2 then go to files that are opened: what is printed must not get into them."""
    for name, closed in itertools.islice(closed_runs(random.Random(0)), times(6)):
        fixtures.learn(name)
        fixtures.prepare(name)
        command = [sys.executable, "-m", "neftsurgery", *fixtures.words(name)]
        logs = [tmp_path / "out", tmp_path / "err"]
        with trials.trial(closed, name):
            with open(logs[0], "wb") as out, open(logs[1], "wb") as err:
                done = subprocess.run(
                    ["sh", "-c", f'exec "$@" {CLOSED[closed]}', "sh", *command],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=SECONDS, check=False,
                )  # fmt: skip
            outcome = Outcome(done.returncode, fixtures.answers[name], logs[1].read_text(), 0, 0, 0)
            fixtures.judge(name, outcome, (5,))
            fixtures.clean(name, False)


# --- places for an output


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="file systems of Linux")
@pytest.mark.parametrize("name", [name for name, work in WORKS.items() if work.out is not None])
def test_an_output_where_no_file_can_be(
    fixtures: Fixtures, runner: Runner, trials: Trials, tmp_path: Path, name: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("kept")
    places = ["/proc/x", "/proc/self/fd/x", "/proc/self/fd/99/x", "/proc/1/task/x", "/dev/full/x",
              f"{tmp_path}/pipe", f"{tmp_path}/pipe/x", f"{tmp_path}/loop/x", f"{tmp_path}/file/x",
              f"{tmp_path}/missing/x", f"{tmp_path}/{'n' * 300}"]  # fmt: skip
    fixtures.prepare(name)
    words = fixtures.words(name)
    for place in itertools.islice(itertools.cycle(places), times(len(places))):
        run = [place if word == str(fixtures.root / str(WORKS[name].out)) else word for word in words]
        with trials.trial("an output where no file can be", name):
            check(runner.command(*run, "--force", seconds=SECONDS), 2, 5)
            assert fixtures.look() == fixtures.inputs, "an input changed"
            assert sorted(os.listdir(tmp_path)) == ["file", "loop", "pipe"]
            assert (tmp_path / "file").read_text() == "kept"
