"""Positioned reads and writes are whole, or an error."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from neftsurgery.errors import CorruptFileError
from neftsurgery.storage.positioned import (
    OpenFile,
    consecutive_runs,
    read_exactly,
    write_exactly,
)

RNG = np.random.default_rng(0)


def test_rows_that_the_file_is_too_short_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(20)))
    with closing(OpenFile.at(path)) as file:
        out = np.zeros((3, 4), np.uint8)
        file.read_rows(2, np.array([0, 1, 3]), out)
        assert out.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [14, 15, 16, 17]]
        with pytest.raises(CorruptFileError, match="too soon"):
            file.read_rows(2, np.array([0, 3, 4]), out)


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


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="Linux only")
def test_a_read_that_fails_names_its_file() -> None:
    """Address 0 of a process is not mapped: a real input/output error."""
    path = "/proc/self/mem"
    with closing(OpenFile.at(path)) as file:
        for read in (
            lambda: read_exactly(file.fileno(), memoryview(bytearray(4)), 0, path),
            lambda: file.read_rows(0, np.array([0]), np.zeros((1, 4), np.uint8)),
        ):
            with pytest.raises(OSError, match="Input/output error") as caught:
                read()
            assert caught.value.filename == path


def test_the_status_of_a_file_that_is_gone_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    file = OpenFile.at(path)
    assert file.status().st_size == 4
    fd = file.fileno()
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        file.status()
    assert caught.value.filename == str(path)
    os.dup2(os.open(path, os.O_RDONLY), fd)  # what its finalizer will close
