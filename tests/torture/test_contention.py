"""Other processes write while a command runs: it notices or refuses, and is never silently wrong."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support import raw_folder, snapshot
from torture.runner import Runner
from torture.trials import Trials, times

import neftsurgery as ns

pytestmark = pytest.mark.slow
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``tuned`` (10 MB each), ``patch`` (half of the rows), ``few``, ``patched``, ``scores``."""
    tmp_path = tmp_path_factory.mktemp("fixtures")
    rng = np.random.default_rng(0)
    shape = (640, 1024)
    base = {f"layers.{n}.weight": ("F32", rng.integers(1 << 29, 1 << 30, shape, "u4")) for n in range(4)}
    tuned = {name: (kind, bits ^ np.uint32(5)) for name, (kind, bits) in base.items()}
    raw_folder(tmp_path / "base", base)
    raw_folder(tmp_path / "tuned", tuned)
    sides = tmp_path / "base", tmp_path / "tuned"
    ns.diff(*sides, out=tmp_path / "scores").close()
    options = {"scores": ns.Scores.load(tmp_path / "scores"), "reversible": True}
    ns.extract(*sides, neurons="50%", out=tmp_path / "patch", **options).close()
    ns.extract(*sides, neurons="2%", out=tmp_path / "few", **options).close()
    ns.apply(sides[0], tmp_path / "patch", out=tmp_path / "patched")
    sides = tmp_path / "base", tmp_path / "patched"
    ns.extract(*sides, lossless=True, reversible=True, out=tmp_path / "whole").close()
    return tmp_path


def edit(path: Path, rng: random.Random) -> None:
    """Other bytes of the same length, as a program writes them when it saves in place again."""
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2 + rng.randrange(size // 2 - 64) // 64 * 64)
        file.write(rng.randbytes(64))


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def replace(path: Path, rng: random.Random) -> None:
    """Another file of that name, as an editor or a download leaves it."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    edit(other, rng)
    os.replace(other, path)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


WORKS = {
    "diff": (("diff", "base", "tuned", "-o", "out"), f"base/{WEIGHTS}"),
    "extract": (("extract", "base", "tuned", "--changed", "-o", "out"), f"tuned/{WEIGHTS}"),
    "select": (("select", "scores", "--neurons", "50%", "-o", "out"), "scores"),
    "apply": (("apply", "base", "patch", "-o", "out"), f"base/{WEIGHTS}"),
    "apply (its patch)": (("apply", "base", "patch", "-o", "out"), "patch"),
    "apply --in-place (its patch)": (("apply", "model", "patch", "--in-place"), "patch"),
    "revert": (("revert", "patched", "patch", "-o", "out"), f"patched/{WEIGHTS}"),
    "merge": (("merge", "patch", "few", "--on-overlap", "mean", "-o", "out"), "patch"),
    "export": (("export", "few", "--to", "lora", "-o", "out"), "few"),
}


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("how", [edit, truncate, replace, remove], ids=lambda how: how.__name__)
def test_an_input_changes_while_it_is_read(
    runner: Runner, trials: Trials, fixtures: Path, name: str, how: Callable[[Path, random.Random], None]
) -> None:
    """The result is that of the old file or of the new one, or there is none and the exit code says so."""
    words, victim = WORKS[name]
    path, out, rng = fixtures / victim, fixtures / "out", random.Random(name)
    old = path.read_bytes()
    command = [str(fixtures / word) if (fixtures / word).exists() or word in ("out", "model") else word
               for word in words]  # fmt: skip

    def clear() -> None:
        shutil.rmtree(fixtures / "model", ignore_errors=True)
        shutil.copytree(fixtures / "base", fixtures / "model")
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)

    clear()
    start = time.perf_counter()
    assert runner.command(*command).status == 0
    took = time.perf_counter() - start
    expected = snapshot(out) if out.exists() else snapshot(fixtures / "model")
    noticed = 0
    for _ in range(times(1)):
        clear()
        other = threading.Timer(rng.uniform(0, took), how, (path, rng))
        with trials.trial(f"an input is changed meanwhile ({how.__name__})", name):
            other.start()
            outcome = runner.command(*command)
            other.join()
            try:
                assert "Traceback" not in outcome.err
                assert "internal error" not in outcome.err
                assert outcome.status in (0, 2, 3, 4, 5), outcome
                if "model" in words:
                    model = {k: v for k, v in snapshot(fixtures / "model").items() if "neft" not in k}
                    states = (expected, snapshot(fixtures / "base"))
                    assert model == expected if outcome.status == 0 else model in states
                elif outcome.status == 0 and snapshot(out) != expected:
                    shutil.rmtree(out, ignore_errors=True)  # then it is what the new file gives
                    kept = snapshot(out)[""] if out.exists() else None
                    out.unlink(missing_ok=True)
                    again = runner.command(*command)
                    assert again.status == 0, "made of a file that gives nothing"
                    assert kept is None or snapshot(out)[""] == kept, "made of parts of two files"
                elif outcome.status:
                    assert not out.exists()
                noticed += outcome.status != 0
            finally:
                path.unlink(missing_ok=True)
                path.write_bytes(old)
                clear()
    print(f"{name}, {how.__name__}: noticed {noticed} times")


def test_two_processes_write_one_output(trials: Trials, fixtures: Path) -> None:
    """One of them wins. The other gets an error and leaves nothing. The output is whole."""
    import subprocess
    import sys

    out = fixtures / "out"
    code = (
        "import sys; from neftsurgery.cli.main import run\n"
        "import neftsurgery as ns; ns.apply\nprint('ready', flush=True); sys.stdin.readline()\n"
        "run(['apply', sys.argv[1], sys.argv[2], '-o', sys.argv[3], *sys.argv[4:]])"
    )
    for round in range(times(2, 0.05)):
        with trials.trial("two processes write one output", "apply"):
            force = ["--force"] if round % 2 else []
            racers = [
                subprocess.Popen(
                    [sys.executable, "-c", code, fixtures / side, fixtures / "patch", out, *force],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
                for side in ("base", "patched")
            ]  # fmt: skip
            for racer in racers:
                assert racer.stdout.readline() == "ready\n"  # type: ignore[union-attr]
            ends = [racer.communicate("go\n", timeout=120) for racer in racers]
            codes = [racer.returncode for racer in racers]
            assert sorted(codes) in ([0, 0], [0, 2]) if force else sorted(codes) == [0, 2], ends
            assert snapshot(out) == snapshot(fixtures / "patched")
            assert [path.name for path in fixtures.iterdir() if ".neft-" in path.name] == []
            shutil.rmtree(out)


@pytest.mark.parametrize("patch", ["patch", "whole"])
def test_two_processes_change_one_checkpoint_in_place(
    trials: Trials, runner: Runner, fixtures: Path, patch: str
) -> None:
    """The second one is refused, or finds the change done."""
    shutil.rmtree(fixtures / "model", ignore_errors=True)
    shutil.copytree(fixtures / "base", fixtures / "model")
    ends: list[int] = []

    def change() -> None:
        try:
            ns.apply(fixtures / "model", fixtures / patch, in_place=True)
            ends.append(0)
        except ns.NeftError:
            ends.append(5)

    for _ in range(times(2, 0.3)):
        with trials.trial("two processes change one checkpoint", "apply --in-place"):
            other = threading.Thread(target=change)
            other.start()
            outcome = runner.command("apply", fixtures / "model", fixtures / patch, "--in-place")
            other.join()
            assert outcome.status in (0, 3, 4, 5), outcome.err
            if 0 not in (outcome.status, ends[-1]):
                ns.apply(fixtures / "model", fixtures / patch, in_place=True)
            assert snapshot(fixtures / "model") == snapshot(fixtures / "patched")
            ns.revert(fixtures / "model", fixtures / patch, in_place=True)
            assert snapshot(fixtures / "model") == snapshot(fixtures / "base")


def test_the_folder_vanishes(trials: Trials, runner: Runner, fixtures: Path) -> None:
    """The output's folder is moved away or removed while a command writes to it."""
    rng = random.Random(0)
    for round in range(times(4, 0.3)):
        target = fixtures / "folder"
        target.mkdir()

        def vanish(target: Path = target, moved: bool = round % 2 == 0) -> None:
            if moved:
                target.rename(fixtures / "elsewhere")
            else:
                shutil.rmtree(target, ignore_errors=True)

        other = threading.Timer(rng.uniform(0, 0.15), vanish)
        with trials.trial("the output's folder vanishes", "apply"):
            other.start()
            outcome = runner.command("apply", fixtures / "base", fixtures / "patch", "-o", target / "out")
            other.join()
            assert outcome.status in (0, 2, 5), outcome.err
            assert "Traceback" not in outcome.err
            for place in (target, fixtures / "elsewhere"):
                if (place / "out").exists():
                    assert snapshot(place / "out") == snapshot(fixtures / "patched")
        for place in (target, fixtures / "elsewhere"):
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    before = [snapshot(path) for path in paths]
    yield
    assert [snapshot(path) for path in paths] == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", ["a blob", "a link to a blob", "the snapshot", "through a linked folder"])
def test_an_output_in_a_hub_cache_touches_no_blob(
    runner: Runner, trials: Trials, fixtures: Path, tmp_path: Path, where: str, force: bool
) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    blob, link = cache / "blobs" / ("0" * 64), cache / "snapshots" / "abc" / WEIGHTS
    shutil.copyfile(fixtures / "base" / WEIGHTS, blob)
    link.symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / "folder").symlink_to(cache / "snapshots")
    out = {"a blob": blob, "a link to a blob": link, "the snapshot": link.parent,
           "through a linked folder": tmp_path / "folder" / "abc"}[where]  # fmt: skip
    source = link.parent if out.is_dir() else link
    with trials.trial("output in a Hub cache", "apply"), unchanged(tmp_path / "hub"):
        options = ["--force"] if force else []
        outcome = runner.command("apply", source, fixtures / "patch", "-o", out, *options)
        assert outcome.status == 2, outcome.err
        outcome = runner.command("apply", source, fixtures / "patch", "--in-place")
        assert outcome.status == 2, outcome.err
    elsewhere = tmp_path / "link"
    elsewhere.symlink_to(blob)
    with trials.trial("output in a Hub cache", "apply --force over a link"), unchanged(tmp_path / "hub"):
        file = fixtures / "base" / WEIGHTS
        outcome = runner.command("apply", file, fixtures / "patch", "-o", elsewhere, "--force")
        assert outcome.status == 0, outcome.err
        assert not elsewhere.is_symlink(), "the link is replaced, not followed"


def test_hard_links_are_not_written_through(runner: Runner, trials: Trials, fixtures: Path) -> None:
    shutil.rmtree(fixtures / "model", ignore_errors=True)
    shutil.copytree(fixtures / "base", fixtures / "model")
    os.link(fixtures / "model" / WEIGHTS, fixtures / "same")
    with trials.trial("hard links", "apply --in-place"), unchanged(fixtures / "model", fixtures / "same"):
        outcome = runner.command("apply", fixtures / "model", fixtures / "patch", "--in-place")
        assert outcome.status == 2
        assert "hard links" in outcome.err
    with trials.trial("hard links", "apply"), unchanged(fixtures / "model", fixtures / "same"):
        outcome = runner.command("apply", fixtures / "model", fixtures / "patch", "-o", fixtures / "out")
        assert outcome.status == 0
        assert (fixtures / "out" / WEIGHTS).stat().st_nlink == 1
    with trials.trial("hard links", "apply --force over one"), unchanged(fixtures / "same"):
        words = (fixtures / "base" / WEIGHTS, fixtures / "patch", "-o", fixtures / "model" / WEIGHTS)
        assert runner.command("apply", *words, "--force").status == 0
