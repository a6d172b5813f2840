"""Reads of parts of a safetensors file are exact or fail."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest
from support import write_file

from neftsurgery.errors import CorruptFileError
from neftsurgery.tensors.reader import FileBacked, TensorFile

RNG = np.random.default_rng(0)


def test_slices_of_arrays(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(6, 4)
    path = write_file(tmp_path / "x.safetensors", {"a": array, "empty": np.zeros((0, 4), np.float32)})
    with TensorFile.open(path) as file:
        np.testing.assert_array_equal(file.array("a", 2, 5), array[2:5], strict=True)
        np.testing.assert_array_equal(file.array("a", 4), array[4:], strict=True)
        np.testing.assert_array_equal(file.array("a", 4, 99), array[4:], strict=True)
        assert file.array("a", 3, 3).shape == (0, 4)
        assert file.array("empty").shape == (0, 4)
        assert file.array_bytes("a", 1, 2).tobytes() == array[1].tobytes()
        buffer = bytearray(5)
        file.read_into("a", 3, memoryview(buffer))
        assert bytes(buffer) == array.tobytes()[3:8]
    with pytest.raises(ValueError, match="closed"):
        file.array("a")


def test_a_file_cut_short_while_open_is_corrupt(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"a": np.arange(100, dtype=np.float32)})
    with TensorFile.open(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        assert math.isclose(file.array("a", 0, 99)[98], 98)
        with pytest.raises(CorruptFileError, match="too soon") as error:
            file.array("a")
        assert error.value.file == str(path)


def test_an_open_file_reads_on_when_it_is_replaced(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"a": np.arange(5)})
    with TensorFile.open(path) as file:
        write_file(tmp_path / "y", {"a": np.zeros(5, np.int64)}).replace(path)
        assert file.array("a").tolist() == [0, 1, 2, 3, 4]


def test_opening_what_is_no_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TensorFile.open(tmp_path / "none")
    (tmp_path / "x").write_text("{}")
    with pytest.raises(CorruptFileError):
        TensorFile.open(tmp_path / "x")


def test_an_error_while_a_file_is_hashed_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FileBacked(TensorFile.open(write_file(tmp_path / "x", {"a": np.zeros(3, np.float32)})))

    def gone(*arguments: object) -> int:
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(os, "lseek", gone)
    with pytest.raises(OSError, match="stale") as caught:
        file.sha256()
    assert caught.value.filename == str(tmp_path / "x")
