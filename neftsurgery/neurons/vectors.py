"""Vectors of chosen neurons: gathered from any weights, scattered into a file.

Whatever the layout, a neuron's vector is handled as one row of raw bytes, and blocks of rows bound the
memory. Where vectors are contiguous, exactly their bytes are read or written. Where they are strided
(columns), their slab is read in pieces, since its pages are read anyway.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..storage.positioned import consecutive_runs, read_exactly, write_exactly
from ..tensors.arrays import IndexArray, Int64Array, Mask, RawBytes
from ..tensors.header import TensorInfo
from ..tensors.reader import RowReader
from .layout import Layout

# Bytes of vectors handled at once; each thread holds a few such blocks. Every block of strided vectors
# reads their whole slab, so for these fewer and larger blocks are better.
_BLOCK_BYTES = 4 << 20
_STRIDED_BLOCK_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20


def block_memory(layouts: Iterable[Layout], block: int | None = None) -> int:
    """Bytes that a thread holds at most when it compares blocks of such vectors: three blocks."""
    return 3 * (block or _block_bytes(all(layout.contiguous for layout in layouts)))


def _block_bytes(contiguous: bool) -> int:
    return _BLOCK_BYTES if contiguous else _STRIDED_BLOCK_BYTES


def blocks(
    info: TensorInfo, layout: Layout, count: int, block: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cut ``count`` vectors of a tensor into ranges ``(start, stop)`` of ``block`` bytes or one vector."""
    step = max(1, (block or _block_bytes(layout.contiguous)) // max(1, layout.width * info.type.itemsize))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def check_index(index: IndexArray, count: int) -> str | None:
    """Why ``index`` is not an ascending list of unique neurons below ``count``; None if it is."""
    if len(index) == 0:
        return None
    if int(index[0]) < 0 or int(index[-1]) >= count:
        return f"an index is out of range: the tensor has {count} neurons"
    if not np.all(index[1:] > index[:-1]):  # not by differences, which overflow
        return "the indices are not ascending and unique"
    return None


def find(index: Int64Array, wanted: Int64Array) -> tuple[Int64Array, Mask]:
    """Where in the ascending ``index`` each of ``wanted`` is, and whether it is."""
    slot = np.searchsorted(index, wanted)
    hit = slot < len(index)
    hit[hit] = index[slot[hit]] == wanted[hit]
    return slot, hit


def distinct_counts(
    parts: Iterable[tuple[TensorInfo, Layout, IndexArray]],
) -> dict[tuple[TensorInfo, Layout], int]:
    """By tensor and layout how many different neurons the indices hold together."""
    indices: dict[tuple[TensorInfo, Layout], list[IndexArray]] = defaultdict(list)
    for info, layout, index in parts:
        indices[info, layout].append(index)
    return {tensor: len(np.unique(np.concatenate(several))) for tensor, several in indices.items()}


def gather(
    source: RowReader,
    info: TensorInfo,
    layout: Layout,
    index: IndexArray,
    *,
    block: int | None = None,
) -> RawBytes:
    """The vectors of neurons ``index`` (ascending) as raw bytes, shape ``[k, width * itemsize]``."""
    size = info.type.itemsize
    out = np.empty((len(index), layout.width * size), dtype=np.uint8)
    if out.size == 0:
        return out
    if layout.contiguous:
        source.read_rows(info.name, index, out)
        return out
    elements = out.view(info.type.carrier)
    read = functools.partial(source.read_into, info.name)
    for _, _, grid, chosen, part in _pieces(read, info, layout, index, block):
        elements[part] = grid[chosen].reshape(len(chosen[0]), -1)
    return out


def scatter(
    fd: int,
    offset: int,
    info: TensorInfo,
    layout: Layout,
    index: IndexArray,
    vectors: RawBytes,
    path: str,
    *,
    block: int | None = None,
) -> int:
    """Write ``vectors`` over neurons ``index`` of the tensor at ``offset`` in ``fd``; returns the bytes."""
    if vectors.size == 0:
        return 0
    if layout.contiguous:
        for first, last, neuron in consecutive_runs(index):
            write_exactly(fd, vectors[first:last].data.cast("B"), offset + neuron * vectors.shape[1])
        return vectors.nbytes
    elements = np.ascontiguousarray(vectors).view(info.type.carrier)
    written = 0

    def read(start: int, buffer: memoryview) -> None:
        read_exactly(fd, buffer, offset + start, path)

    for start, raw, grid, chosen, part in _pieces(read, info, layout, index, block):
        grid[chosen] = elements[part].reshape(-1, *grid.shape[len(chosen) :])
        write_exactly(fd, raw.data, offset + start)
        written += raw.nbytes
    return written


def _pieces(
    read: Callable[[int, memoryview], None],
    info: TensorInfo,
    layout: Layout,
    index: IndexArray,
    block: int | None,
) -> Iterator[tuple[int, RawBytes, NDArray[np.unsignedinteger], tuple[IndexArray, ...], tuple[slice, slice]]]:
    """Read the slabs that hold the neurons ``index``, piece by piece along their outermost (vector) axis.

    Yields the piece's first byte in the tensor; its bytes; a view of them, neuron axes first; where in that
    the chosen neurons are; and which of the neurons these are, and which elements of their vectors.
    """
    size = info.type.itemsize
    groups = layout.slab_groups
    sizes = [n for _, n in groups]
    neuron_axes = [axis for axis, (is_neuron, _) in enumerate(groups) if is_neuron]
    vector_axes = [axis for axis in range(len(groups)) if axis not in neuron_axes]
    grid_sizes = [sizes[axis] for axis in neuron_axes]
    row_elements = layout.slab_elements // sizes[0]
    tail = layout.width // sizes[0]
    step = max(1, (block or _PIECE_BYTES) // (row_elements * size))
    slab_of = np.asarray(index) // layout.neurons_per_slab
    for slab in np.unique(slab_of):
        low, high = np.searchsorted(slab_of, [slab, slab + 1])
        local = np.asarray(index[low:high]) - slab * layout.neurons_per_slab
        chosen = tuple(np.unravel_index(local, grid_sizes))
        for row in range(0, sizes[0], step):
            rows = min(step, sizes[0] - row)
            raw = np.empty(rows * row_elements * size, dtype=np.uint8)
            start = (int(slab) * layout.slab_elements + row * row_elements) * size
            read(start, raw.data)
            grid = (
                raw.view(info.type.carrier).reshape([rows, *sizes[1:]]).transpose(neuron_axes + vector_axes)
            )
            place = slice(row * tail, (row + rows) * tail)
            yield start, raw, grid, chosen, (slice(int(low), int(high)), place)
