"""Mapped files that are truncated: noticed, where the system would end the process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import raw_folder

import neftsurgery as ns
from neftsurgery.cli.main import cli
from neftsurgery.scoring import engine
from neftsurgery.storage.page_cache import is_truncated, map_cached, sigbus_guard
from neftsurgery.storage.threads import Limits
from neftsurgery.surgery.diff import plan_diff

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps files here")
SIZE = 1 << 20


@pytest.fixture
def window(tmp_path: Path) -> np.ndarray:
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with open(path, "rb") as opened:
        found = map_cached(opened.fileno(), 0, SIZE)
    if found is None:
        pytest.skip("this file system does not tell what is in memory")
    return found


def test_a_mapping_that_loses_its_file_reads_as_zeros_and_says_so(tmp_path: Path, window: np.ndarray) -> None:
    with sigbus_guard(), sigbus_guard():
        assert int(window.sum()) == SIZE * ord("x")
        assert not is_truncated(window)
        os.truncate(tmp_path / "file", 0)
        assert int(window.sum()) == 0
        assert is_truncated(window[5:6])


def test_a_new_mapping_at_an_old_place_is_whole(tmp_path: Path, window: np.ndarray) -> None:
    with sigbus_guard():
        os.truncate(tmp_path / "file", 0)
        assert window[0] == 0
    assert is_truncated(window)
    place = window[:]
    del window
    assert is_truncated(place), "a part keeps the mapping"
    del place
    again = np.zeros(SIZE, np.uint8)
    assert not is_truncated(again)


OTHERS = """
import mmap, os, sys
from neftsurgery.storage.threads import Limits
from neftsurgery.storage.page_cache import sigbus_guard
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
with sigbus_guard():
    os.truncate(sys.argv[1], 0)
    mapping[0]
"""


def test_a_mapping_that_is_not_ours_is_left_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    done = subprocess.run([sys.executable, "-c", OTHERS, tmp_path / "file"], check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS


def pair_of_files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        raw_folder(tmp_path / name, {"w": ("F32", rng.standard_normal((1024, 512), "f4").view("u4"))})
        for name in "ab"
    ]


def scored(sides: list[Path], out: Path, *, mapped: bool) -> None:
    plan_diff(*sides, out=out).run(limits=Limits.of(mapped=mapped)).close()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_model_that_is_truncated_while_it_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    sides = pair_of_files(tmp_path)
    file, sums = sides[1] / "model.safetensors", engine.partial_sums

    def late(*arguments: object) -> object:
        os.truncate(file, 5000)
        return sums(*arguments)

    monkeypatch.setattr(engine, "partial_sums", late)
    with pytest.raises((ns.CorruptFileError, ns.MachineError), match=r"truncated|changed by someone"):
        scored(sides, tmp_path / "scores", mapped=mapped)
    assert not (tmp_path / "scores").exists()


def handler_of_the_system() -> bytes:
    """What the C library says of SIGBUS: Python's `signal` does not see handlers that others install."""
    action = (ctypes.c_ubyte * 256)()
    assert ctypes.CDLL(None).sigaction(int(signal.SIGBUS), None, ctypes.byref(action)) == 0
    return bytes(action[:8])  # the handler's address; some of the rest is never filled in


def test_only_the_command_line_installs_a_handler_and_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = pair_of_files(tmp_path)
    before, python_before = handler_of_the_system(), signal.getsignal(signal.SIGBUS)
    during: list[bytes] = []
    sums = engine.partial_sums

    def noting(*arguments: object) -> object:
        during.append(handler_of_the_system())
        return sums(*arguments)

    monkeypatch.setattr(engine, "partial_sums", noting)
    ns.diff(*sides, out=tmp_path / "library").close()
    assert during
    assert set(during) == {before}, "a library leaves the signals of its process alone"
    during.clear()
    done = CliRunner().invoke(cli, ["diff", *map(str, sides), "-o", str(tmp_path / "command")])
    assert done.exit_code == 0, done.output
    assert during
    assert before not in during
    assert handler_of_the_system() == before
    assert signal.getsignal(signal.SIGBUS) == python_before
    assert (tmp_path / "command").read_bytes() == (tmp_path / "library").read_bytes()
