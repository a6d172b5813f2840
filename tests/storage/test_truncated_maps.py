"""Mapped files that are cut short: noticed, where the system would end the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import raw_folder

import neftsurgery as ns
from neftsurgery.scoring import engine
from neftsurgery.storage.page_cache import resident
from neftsurgery.storage.truncated_maps import survived, was_cut_short

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps files here")
SIZE = 1 << 20


@pytest.fixture
def window(tmp_path: Path) -> np.ndarray:
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    with open(path, "rb") as opened:
        found = resident(opened.fileno(), 0, SIZE)
    if found is None:
        pytest.skip("this file system does not tell what is in memory")
    return found


def test_a_mapping_that_loses_its_file_reads_as_zeros_and_says_so(tmp_path: Path, window: np.ndarray) -> None:
    with survived(), survived():
        assert int(window.sum()) == SIZE * ord("x")
        assert not was_cut_short(window)
        os.truncate(tmp_path / "file", 0)
        assert int(window.sum()) == 0
        assert was_cut_short(window[5:6])


def test_a_new_mapping_at_an_old_place_is_whole(tmp_path: Path, window: np.ndarray) -> None:
    with survived():
        os.truncate(tmp_path / "file", 0)
        assert window[0] == 0
    assert was_cut_short(window)
    place = window[:]
    del window
    assert was_cut_short(place), "a part keeps the mapping"
    del place
    again = np.zeros(SIZE, np.uint8)
    assert not was_cut_short(again)


OTHERS = """
import mmap, os, sys
from neftsurgery.storage.truncated_maps import survived
with open(sys.argv[1], "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
with survived():
    os.truncate(sys.argv[1], 0)
    mapping[0]
"""


def test_a_mapping_that_is_not_ours_is_left_to_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    done = subprocess.run([sys.executable, "-c", OTHERS, tmp_path / "file"], check=False, timeout=60)
    assert done.returncode == -signal.SIGBUS


def test_a_model_that_is_cut_short_while_it_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [raw_folder(tmp_path / name, {"w": ("F32", np.ones((1024, 512), "u4"))}) for name in "ab"]
    file, sums = sides[1] / "model.safetensors", engine.partial_sums

    def late(*arguments: object) -> object:
        os.truncate(file, 5000)
        return sums(*arguments)

    monkeypatch.setattr(engine, "partial_sums", late)
    with pytest.raises((ns.CorruptFileError, ns.MachineError), match=r"cut short|changed by someone"):
        ns.diff(*sides, out=tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
