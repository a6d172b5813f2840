"""Bytes mapped where they lie in memory: the right ones, and never a dead process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from neftsurgery.storage import page_cache as module
from neftsurgery.storage.page_cache import map_cached

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(300_000))
    return path


@pytest.mark.parametrize("place", [(0, 300_000), (1, 4096), (4096, 4096), (123_457, 99), (299_999, 1)])
def test_the_bytes_of_a_warm_file(file, place):
    start, size = place
    with open(file, "rb") as opened:
        found = map_cached(opened.fileno(), start, size)
    if found is None:
        pytest.skip("this file system does not tell")
    assert found.tobytes() == file.read_bytes()[start : start + size]  # also after the file was closed
    found[:] = 0
    assert file.read_bytes()[start : start + size] != bytes(size)  # the mapping is private


def test_a_cold_file_is_not_mapped(file):
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            pytest.skip("the file stayed in memory")
        except BlockingIOError:
            assert map_cached(opened.fileno(), 0, 300_000) is None


def test_past_the_end_there_is_nothing(file):
    with open(file, "rb") as opened:
        assert map_cached(opened.fileno(), 299_000, 1001) is None
        assert map_cached(opened.fileno(), 1 << 40, 1) is None
        assert map_cached(opened.fileno(), 0, 0) is None


def test_a_file_cut_short_after_it_was_looked_at(file, monkeypatch):
    """The pages are gone between the look and the mapping: no signal, but None, and a read tells."""
    looked = module.is_cached

    def then_cut(fd: int, start: int, size: int) -> bool:
        answer = looked(fd, start, size)
        os.truncate(file, 5000)
        return answer

    monkeypatch.setattr(module, "is_cached", then_cut)
    with open(file, "rb") as opened:
        assert map_cached(opened.fileno(), 0, 300_000) is None


def test_descriptors_that_cannot_be_mapped(tmp_path):
    reader, writer = os.pipe()
    try:
        assert map_cached(reader, 0, 10) is None
    finally:
        os.close(reader)
        os.close(writer)
