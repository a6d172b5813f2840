"""One patch over another on the same tensor, in memory; they may cut it along different axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..neurons.layout import Layout
from ..tensors.arrays import Int64Array
from .patch import Patch, PatchTensor, Raw

__all__ = ["overlay"]

_ELEMENTS = 1 << 18  # looked up at once; each takes some ten words of memory


def overlay(vectors: Raw, index: Int64Array, tensor: PatchTensor, earlier: Patch) -> None:
    """Put the values of ``earlier`` into ``vectors``, the raw vectors of neurons ``index`` of a tensor.

    Vectors that the earlier patch does not touch stay as they are.
    """
    name = tensor.info.name
    theirs, their_index = earlier.tensors[name], earlier.index(name)
    if theirs.layout.axes == tensor.layout.axes:
        slot, hit = _find(their_index, index)
        for start, stop in theirs.blocks():
            here = hit & (slot >= start) & (slot < stop)
            if here.any():
                vectors[here] = earlier.values(name, start, stop)[slot[here] - start]
        return
    elements = vectors.view(tensor.info.type.carrier)
    step = max(1, _ELEMENTS // max(1, tensor.layout.width))
    for first in range(0, len(index), step):
        neuron, place = _owner(theirs.layout, _positions(tensor.layout, index[first : first + step]))
        slot, hit = _find(their_index, neuron)
        for start, stop in theirs.blocks():
            here = hit & (slot >= start) & (slot < stop)
            if here.any():
                values = earlier.values(name, start, stop).view(tensor.info.type.carrier)
                elements[first : first + step][here] = values[slot[here] - start, place[here]]


def _find(index: Int64Array, wanted: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Where in the ascending ``index`` each of ``wanted`` is, and whether it is."""
    slot = np.searchsorted(index, wanted)
    hit = slot < len(index)
    hit[hit] = index[slot[hit]] == wanted[hit]
    return slot, hit


def _positions(layout: Layout, index: Int64Array) -> Int64Array:
    """The flat positions in the tensor of the elements of neurons ``index``, ``[k, width]``."""
    shape = layout.shape
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    others = [axis for axis in range(len(shape)) if axis not in layout.axes]
    start = _offset(index, [shape[a] for a in layout.axes], [strides[a] for a in layout.axes])
    inner = _offset(
        np.arange(layout.width, dtype=np.int64), [shape[a] for a in others], [strides[a] for a in others]
    )
    positions: Int64Array = start[:, None] + inner
    return positions


def _offset(flat: Int64Array, sizes: Sequence[int], strides: Sequence[int]) -> Int64Array:
    total = np.zeros(len(flat), np.int64)
    rest = flat.astype(np.int64)
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        total += rest % size * stride
        rest = rest // size
    return total


def _owner(layout: Layout, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Per flat position the neuron it belongs to, and where in that neuron's vector it is."""
    neuron, place = np.zeros_like(positions), np.zeros_like(positions)
    neuron_stride = place_stride = 1
    rest = positions.copy()
    for axis in reversed(range(len(layout.shape))):
        size = layout.shape[axis]
        if axis in layout.axes:
            neuron += rest % size * neuron_stride
            neuron_stride *= size
        else:
            place += rest % size * place_stride
            place_stride *= size
        rest //= size
    return neuron, place
