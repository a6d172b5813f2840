"""Files written by position are what the safetensors package reads."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file

from neftsurgery.errors import MachineError, MismatchError, UsageError
from neftsurgery.tensors.dtypes import DTYPES
from neftsurgery.tensors.header import FilePlan, TensorInfo, read_header
from neftsurgery.tensors.writer import TensorFileWriter, written_file

RNG = np.random.default_rng(0)
NUMPY = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "F64": np.float64,
}
WHOLE_BYTES = [name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0]


def arrays_of(entries: list[TensorInfo]) -> dict[str, NDArray[Any]]:
    return {e.name: RNG.integers(0, 100, e.shape).astype(NUMPY[e.dtype]) for e in entries}


ENTRIES = [
    TensorInfo("a:index", "I32", (5,)),
    TensorInfo("a:value", "F16", (5, 3)),
    TensorInfo("a:base_digest", "U8", (5, 16)),
    TensorInfo("b", "F64", (2, 3, 4)),
    TensorInfo("scalar", "F32", ()),
    TensorInfo("empty", "F32", (0, 7)),
    TensorInfo("narrow", "I64", (4, 0)),
]


def test_what_is_written_is_what_the_package_reads(tmp_path: Path) -> None:
    arrays, out = arrays_of(ENTRIES), tmp_path / "x.safetensors"
    with written_file(ENTRIES, {"doc": "?" * 50}, out) as written:
        for name, array in arrays.items():
            written.write(name, 0, array)
        written.finish({"doc": "short"})
    theirs = load_file(out)
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert theirs[name].dtype == array.dtype
        np.testing.assert_array_equal(theirs[name], array, strict=True)
    with safe_open(out, framework="numpy") as file:
        assert file.metadata() == {"doc": "short"}
    with written.reader() as reader:
        assert reader.header.metadata == {"doc": "short"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(reader.array(name), array, strict=array.shape != ())


def test_entries_are_aligned_and_the_file_is_as_large_as_said(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with written_file(ENTRIES, {"doc": "x"}, out) as written:
        written.finish({})
    header = read_header(out)
    assert header.size % 8 == 0
    assert {n: i.shape for n, i in header.tensors.items()} == {e.name: e.shape for e in ENTRIES}
    for entry in ENTRIES:
        assert header.offsets[entry.name] % entry.type.itemsize == 0
    assert out.stat().st_size == written.nbytes == header.size + sum(e.nbytes for e in ENTRIES)
    assert not any(out.read_bytes()[header.size :])  # what was not written is zero


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[TensorInfo], list[tuple[str, int, NDArray[np.uint8]]]]:
    """Entries, and writes of rows of raw bytes that cover them, in any order."""
    entries, writes = [], []
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(WHOLE_BYTES))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        info = TensorInfo(f"t{number}", dtype, shape)
        entries.append(info)
        rows = shape[0] if shape else 1
        row = info.nbytes // rows if rows else 0
        raw = RNG.integers(0, 256, (rows, row), dtype=np.uint8)
        cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=2))})
        writes += [(info.name, a, raw[a:b]) for a, b in itertools.pairwise(cuts)]
    return entries, draw(st.permutations(writes))


@settings(max_examples=100, deadline=None, database=None)
@given(plans(), st.booleans())
def test_rows_may_come_in_any_order(
    plan: tuple[list[TensorInfo], list[tuple[str, int, NDArray[np.uint8]]]], spooled: bool
) -> None:
    entries, writes = plan
    with tempfile.TemporaryDirectory() as folder:
        out = None if spooled else Path(folder) / "x.safetensors"
        copy = Path(folder) / "copy.safetensors"
        with written_file(entries, {}, out) as written:
            for name, start, rows in writes:
                written.write(name, start, rows)
            written.finish({})
        with written.reader() as reader, reader.stream() as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
            assert reader.nbytes == written.nbytes
            for name, start, rows in writes:
                np.testing.assert_array_equal(reader.array_bytes(name, start, start + len(rows)), rows)
        assert out is None or out.read_bytes() == copy.read_bytes()
        theirs = dict(deserialize(copy.read_bytes()))
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in theirs.items()} == {
        e.name: (e.dtype, e.shape) for e in entries
    }
    for name, start, rows in writes:
        begin = start * rows.shape[1]
        assert bytes(theirs[name]["data"])[begin : begin + rows.nbytes] == rows.tobytes()


def test_a_spooled_file_has_no_name_and_goes_with_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/dev/fd"))
    with written_file([TensorInfo("a", "F32", (4,))], {"k": "?"}, None) as written:
        assert os.listdir(tmp_path) == []
        written.write("a", 0, np.arange(4, dtype=np.float32))
        with pytest.raises(ValueError, match="not finished"):
            written.reader()
        written.finish({"k": "v"})
    reader = written.reader()
    assert reader.path is None
    assert reader.header.metadata == {"k": "v"}
    assert reader.array("a").tolist() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == before + 1
    del reader, written
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before


def test_non_contiguous_data_is_written_in_its_own_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = tmp_path / "x.safetensors"
    with written_file([TensorInfo("a", "F32", (4, 3))], {}, out) as written:
        written.write("a", 0, array.T)
        written.finish({})
    np.testing.assert_array_equal(load_file(out)["a"], array.T)


def test_writes_from_several_threads(tmp_path: Path) -> None:
    rows = RNG.integers(0, 256, (64, 1000), dtype=np.uint8)
    out = tmp_path / "x.safetensors"
    with written_file([TensorInfo("a", "U8", rows.shape)], {}, out) as written:

        def write(first: int) -> None:
            for row in range(first, 64, 8):
                written.write("a", row, rows[row : row + 1])

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        written.finish({})
    np.testing.assert_array_equal(load_file(out)["a"], rows)


@pytest.mark.parametrize("buffer_bytes", [1, 300, 1 << 20])
def test_small_writes_in_any_order(tmp_path: Path, buffer_bytes: int) -> None:
    """They are collected and joined; large ones are written past them; nothing is lost or moved."""
    arrays = {f"t{n}": RNG.integers(0, 99, size, dtype=np.int64) for n, size in enumerate((3, 1, 40, 7, 2))}
    out = tmp_path / "x.safetensors"
    plan = FilePlan.of([TensorInfo(n, "I64", a.shape) for n, a in arrays.items()], {})
    with out.open("wb") as file:
        writer = TensorFileWriter(plan, file.fileno(), out, small_bytes=100, buffer_bytes=buffer_bytes)
        places = [(name, row) for name, array in arrays.items() if name != "t2" for row in range(len(array))]
        for place in RNG.permutation(len(places)):
            name, row = places[place]
            writer.write(name, row, arrays[name][row : row + 1])
        writer.write("t2", 0, arrays["t2"])
        writer.finish({})
    for name, array in load_file(out).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("start", [2, 3, -1])
def test_a_write_outside_its_entry_is_refused(tmp_path: Path, start: int) -> None:
    with (
        pytest.raises(ValueError, match="do not fit entry 'a'"),
        written_file(
            [TensorInfo("a", "U8", (3, 4)), TensorInfo("b", "U8", (9,))], {}, tmp_path / "x"
        ) as written,
    ):
        written.write("a", start, np.zeros((2, 4), np.uint8))
    assert os.listdir(tmp_path) == []


def test_metadata_may_shrink_but_not_outgrow_its_room(tmp_path: Path) -> None:
    entries = [TensorInfo("a", "U8", (3,))]
    with written_file(entries, {"k": "x" * 100}, tmp_path / "good") as written:
        written.finish({"k": "y" * 100})
    assert read_header(tmp_path / "good").metadata == {"k": "y" * 100}
    with (
        pytest.raises(ValueError, match="takes"),
        written_file(entries, {"k": "x" * 100}, tmp_path / "bad") as written,
    ):
        written.finish({"k": "y" * 200})
    assert os.listdir(tmp_path) == ["good"]


@pytest.mark.parametrize("spooled", [False, True])
def test_names_that_clash_are_a_mismatch(tmp_path: Path, spooled: bool) -> None:
    # A model with tensors "a" and "a:index" cannot have a patch of both.
    entries = [TensorInfo("a:index", "I32", (2,)), TensorInfo("a:index", "F32", (2, 2))]
    out = None if spooled else tmp_path / "x"
    with pytest.raises(MismatchError, match="'a:index'"), written_file(entries, {}, out):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_what_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with written_file([], {}, tmp_path / "x") as written:
            written.finish({})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


class StopError(Exception):
    pass


def fail_after_a_write(writer: TensorFileWriter, error: type[BaseException]) -> None:
    writer.write("b", 0, np.zeros((2, 3, 4)))
    raise error


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name, force in (("new", False), ("old", True)):
        with pytest.raises(error), written_file(ENTRIES, {}, tmp_path / name, force=force) as written:
            fail_after_a_write(written, error)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(UsageError), written_file([], {}, tmp_path / "x") as written:
        written.finish({})
    assert (tmp_path / "x").read_bytes() == b"old"
    with written_file([], {}, tmp_path / "x", force=True) as written:
        written.finish({})
    assert load_file(tmp_path / "x") == {}
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("spooled", [False, True])
def test_a_file_that_cannot_fit_the_disk_is_refused_before_it_is_begun(tmp_path: Path, spooled: bool) -> None:
    entries = [TensorInfo("a", "U8", (1 << 60,))]
    out = None if spooled else tmp_path / "x"
    with pytest.raises(MachineError, match="not enough space"), written_file(entries, {}, out):
        pass
    assert os.listdir(tmp_path) == []
