"""Positioned reads and writes are whole, or an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from neftsurgery.errors import CorruptFileError
from neftsurgery.storage.positioned import consecutive_runs, read_exactly, read_rows_exactly, write_exactly

RNG = np.random.default_rng(0)


def test_rows_that_the_file_is_too_short_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(20)))
    with open(path, "rb") as file:
        out = np.zeros((3, 4), np.uint8)
        read_rows_exactly(file.fileno(), 2, np.array([0, 1, 3]), out, path)
        assert out.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [14, 15, 16, 17]]
        with pytest.raises(CorruptFileError, match="too soon"):
            read_rows_exactly(file.fileno(), 2, np.array([0, 3, 4]), out, path)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_consecutive_runs(dtype: type[np.integer]) -> None:
    index = np.array([0, 1, 2, 5, 7, 8, 11], dtype)
    assert list(consecutive_runs(index)) == [(0, 3, 0), (3, 4, 5), (4, 6, 7), (6, 7, 11)]
    assert list(consecutive_runs(index[:0])) == []


def test_a_write_that_never_moves_a_byte_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: 0)
    with open(tmp_path / "x", "wb") as file, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_exactly(file.fileno(), b"abc", 0)


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RNG.integers(0, 256, 100, dtype=np.uint8).tobytes()
    path = tmp_path / "x"
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        write_exactly(fd, data, 11)
        buffer = bytearray(100)
        read_exactly(fd, memoryview(buffer), 11, path)
    finally:
        os.close(fd)
    assert bytes(buffer) == data
    assert path.read_bytes() == bytes(11) + data
