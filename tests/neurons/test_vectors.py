"""Gather and scatter against numpy's own indexing, whatever the shape, axes and size of the pieces."""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neftsurgery.errors import CorruptFileError
from neftsurgery.neurons.layout import Layout
from neftsurgery.neurons.vectors import blocks, gather, scatter
from neftsurgery.tensors.header import TensorInfo

DTYPES = {
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
    "BF16": np.uint16,
    "F32": np.uint32,
    "C64": np.uint64,
    "I64": np.int64,
}
PAD = 5  # bytes before and after the tensor in its file: nothing is aligned


@dataclass
class Case:
    """A tensor in memory, the neurons asked for, and the largest pieces in bytes (None: as they are)."""

    info: TensorInfo
    layout: Layout
    index: NDArray[np.int64]
    array: NDArray[np.generic]
    limit: int | None

    def vectors(self, array: NDArray[np.generic] | None = None) -> NDArray[np.uint8]:
        """The oracle: slices by numpy, one neuron at a time, as raw bytes."""
        array = self.array if array is None else array
        rows = []
        for place in itertools.product(*(range(self.layout.shape[axis]) for axis in self.layout.axes)):
            where: list[object] = [slice(None)] * array.ndim
            for axis, at in zip(self.layout.axes, place, strict=True):
                where[axis] = at
            rows.append(np.frombuffer(np.asarray(array[tuple(where)]).tobytes(), np.uint8))
        width = self.layout.width * self.info.type.itemsize
        return np.array([rows[i] for i in self.index], np.uint8).reshape(len(self.index), width)


class Memory:
    """A tensor's bytes in memory; notes the bytes asked for."""

    def __init__(self, array: NDArray[np.generic]) -> None:
        self.raw = array.tobytes()
        self.asked = 0

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        assert name == "w"
        assert start >= 0
        assert start + len(buffer) <= len(self.raw)
        buffer[:] = self.raw[start : start + len(buffer)]
        self.asked += len(buffer)

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        out[:] = np.frombuffer(self.raw, np.uint8).reshape(-1, out.shape[1])[rows]
        self.asked += out.nbytes


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(shape) - 1)))))
    layout = Layout(shape, axes)
    chosen = draw(st.sets(st.integers(0, layout.count - 1)) | st.just(set(range(layout.count))))
    dtype = draw(st.sampled_from(list(DTYPES)))
    seed = draw(st.integers(0, 2**32 - 1))
    return make(shape, axes, dtype, sorted(chosen), draw(st.sampled_from([None, 1, 3, 8, 20, 64])), seed)


def make(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dtype: str,
    index: list[int],
    limit: int | None,
    seed: int = 0,
) -> Case:
    size = np.dtype(DTYPES[dtype]).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * size, dtype=np.uint8)
    return Case(
        TensorInfo("w", dtype, shape),
        Layout(shape, axes),
        np.array(index, dtype=np.int64),
        raw.view(DTYPES[dtype]).reshape(shape),
        limit,
    )


KNOWN = [
    make((6, 4), (0,), "F32", [0, 1, 5], 8),
    make((6, 4), (1,), "BF16", [1, 3], 9),
    make((3, 5, 4), (0, 1), "BF16", [0, 7, 14], 1),
    make((3, 5, 4), (0, 2), "F32", [0, 3, 4, 11], 20),
    make((2, 3, 2, 3, 2), (0, 2, 4), "F32", [0, 5, 6, 7], 64),
    make((2, 3, 2, 3, 2), (1, 3), "BF16", [2, 8], 20),
]


@settings(max_examples=400, deadline=None, database=None)
@given(cases())
@example(KNOWN[0])
@example(KNOWN[3])
@example(KNOWN[4])
def test_gather(case: Case) -> None:
    memory = Memory(case.array)
    found = gather(memory, case.info, case.layout, case.index, block=case.limit)
    expected = case.vectors()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected, strict=True)
    if case.layout.contiguous:
        assert memory.asked == expected.nbytes
    else:
        assert memory.asked <= len(memory.raw)


@settings(max_examples=400, deadline=None, database=None)
@given(cases())
@example(KNOWN[1])
@example(KNOWN[3])
@example(KNOWN[4])
@example(KNOWN[5])
def test_scatter(case: Case) -> None:
    """New vectors are all that changes; the old ones put back restore every byte of the file."""
    rng = np.random.default_rng(1)
    before = rng.bytes(PAD) + case.array.tobytes() + rng.bytes(PAD)
    old = case.vectors()
    new = ~old  # every byte differs
    with tempfile.TemporaryFile() as file:
        file.write(before)
        file.flush()
        place = (file.fileno(), PAD, case.info, case.layout, case.index)
        written = scatter(*place, new, "w", block=case.limit)
        after = os.pread(file.fileno(), 1 << 20, 0)
        scatter(*place, old, "w", block=case.limit)
        assert os.pread(file.fileno(), 1 << 20, 0) == before
    assert len(after) == len(before)
    assert (after[:PAD], after[-PAD:]) == (before[:PAD], before[-PAD:])
    array = np.frombuffer(after[PAD:-PAD], case.array.dtype).reshape(case.array.shape)
    np.testing.assert_array_equal(case.vectors(array), new)
    differing = np.frombuffer(after, np.uint8) != np.frombuffer(before, np.uint8)
    assert differing.sum() == new.size
    assert new.nbytes <= written <= case.array.nbytes


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: f"{case.info.shape}-{case.layout.axes}")
def test_scatter_of_what_was_gathered_changes_no_byte(case: Case) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(case.array.tobytes())
        file.flush()
        found = gather(Memory(case.array), case.info, case.layout, case.index)
        scatter(file.fileno(), 0, case.info, case.layout, case.index, found, "w")
        assert os.pread(file.fileno(), 1 << 20, 0) == case.array.tobytes()


@settings(max_examples=200, deadline=None, database=None)
@given(cases(), st.integers(0, 200))
def test_blocks_cover_the_count_in_order(case: Case, count: int) -> None:
    cut = list(blocks(case.info, case.layout, count, block=case.limit))
    edges = [0, *(stop for _, stop in cut)]
    assert [start for start, _ in cut] == edges[:-1]
    assert edges[-1] == count
    row = case.layout.width * case.info.type.itemsize
    for start, stop in cut:
        assert start < stop
        assert stop - start == 1 or case.limit is None or (stop - start) * row <= case.limit


def test_blocks_bound_the_memory() -> None:
    info = TensorInfo("w", "BF16", (11008, 4096))
    for axes in ((0,), (1,)):
        layout = Layout(info.shape, axes)
        sizes = [(stop - start) * layout.width * 2 for start, stop in blocks(info, layout, layout.count)]
        assert sum(sizes) == info.nbytes
        assert max(sizes) <= 16 << 20
        assert len(sizes) > 1


def test_pieces_bound_the_memory_of_columns() -> None:
    case = make((40, 8), (1,), "BF16", [2, 5], None)
    sizes = []

    class Noting(Memory):
        def read_into(self, name: str, start: int, buffer: memoryview) -> None:
            sizes.append(len(buffer))
            super().read_into(name, start, buffer)

    found = gather(Noting(case.array), case.info, case.layout, case.index, block=64)
    np.testing.assert_array_equal(found, case.vectors())
    assert sizes == [64] * 10


def test_only_slabs_with_chosen_neurons_are_read() -> None:
    case = make((6, 5, 4), (0, 2), "F32", [4, 6, 20], None)  # experts 1, 1 and 5
    memory = Memory(case.array)
    np.testing.assert_array_equal(gather(memory, case.info, case.layout, case.index), case.vectors())
    assert memory.asked == 2 * case.array[0].nbytes


@pytest.mark.parametrize("axes", [(0,), (1,)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_any_integer_type_of_index(axes: tuple[int, ...], dtype: type[np.integer]) -> None:
    case = make((6, 5), axes, "F32", [0, 1, 4], None)
    found = gather(Memory(case.array), case.info, case.layout, case.index.astype(dtype))
    np.testing.assert_array_equal(found, case.vectors())


@pytest.mark.parametrize(
    ("shape", "axes"), [((0, 4), (0,)), ((4, 0), (0,)), ((0, 4), (1,)), ((4, 0), (1,)), ((3, 0, 2), (0, 2))]
)
def test_nothing_to_do(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    info, layout = TensorInfo("w", "F32", shape), Layout(shape, axes)
    index = np.arange(layout.count)
    found = gather(Memory(np.zeros(shape, np.float32)), info, layout, index)
    assert found.shape == (layout.count, layout.width * 4)
    assert scatter(-1, 0, info, layout, index, found, "w") == 0  # no file is touched: there is none
    assert list(blocks(info, layout, 0)) == []


def test_a_file_that_ends_too_soon_is_named() -> None:
    case = make((6, 5), (1,), "F32", [0, 1], None)
    with tempfile.TemporaryFile() as file:
        file.write(case.array.tobytes()[:-1])
        file.flush()
        with pytest.raises(CorruptFileError) as error:
            scatter(file.fileno(), 0, case.info, case.layout, case.index, case.vectors(), "the/file")
    assert error.value.file == "the/file"
