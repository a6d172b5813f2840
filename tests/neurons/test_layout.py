"""Neurons by brute force: the oracle numbers every element and slices the array as the definition says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neftsurgery.neurons.layout import Layout


@st.composite
def layouts(draw: st.DrawFn, least: int = 0) -> Layout:
    shape = draw(st.lists(st.integers(least, 4), max_size=5))
    axes = draw(st.sets(st.integers(0, len(shape) - 1))) if shape else set()
    return Layout.of(shape, sorted(axes))


def vectors_of(layout: Layout) -> NDArray[np.int64]:
    """Per neuron the flat positions of its elements, shape ``[count, width]``."""
    array = np.arange(int(np.prod(layout.shape, dtype=np.int64))).reshape(layout.shape)
    rows = []
    for place in itertools.product(*(range(layout.shape[axis]) for axis in layout.axes)):
        part = array
        for axis, at in zip(reversed(layout.axes), reversed(place), strict=True):
            part = np.take(part, at, axis=axis)
        rows.append(part.reshape(-1))
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1 if rows and rows[0].size else 0)


def neuron_of(vectors: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per element its neuron."""
    result = np.empty(vectors.size, dtype=np.int64)
    for neuron, positions in enumerate(vectors):
        result[positions] = neuron
    return result


@settings(max_examples=300, deadline=None, database=None)
@given(layouts())
@example(Layout((), ()))
@example(Layout((3,), (0,)))
@example(Layout((2, 3, 0), (2,)))
def test_count_and_width(layout: Layout) -> None:
    vectors = vectors_of(layout)
    assert layout.count == len(vectors)
    assert layout.elements == int(np.prod(layout.shape, dtype=np.int64))
    if len(vectors):
        assert layout.width == vectors.shape[1]
    assert layout.count * layout.width == layout.elements


@settings(max_examples=500, deadline=None, database=None)
@given(layouts(least=1))
@example(Layout((4, 3), (0,)))
@example(Layout((4, 3), (1,)))
@example(Layout((2, 3, 4), (0, 2)))
def test_contiguous_says_that_vectors_follow_each_other(layout: Layout) -> None:
    expected = np.arange(layout.elements).reshape(layout.count, layout.width)
    assert layout.contiguous is np.array_equal(vectors_of(layout), expected)


@settings(max_examples=500, deadline=None, database=None)
@given(layouts(least=1), st.data())
def test_runs(layout: Layout, data: st.DataObject) -> None:
    owner = neuron_of(vectors_of(layout))
    is_neuron, size = layout.run
    runs = layout.elements // size
    assert runs * size == layout.elements
    first = layout.run_neurons(0, runs)
    assert first.dtype == np.int64
    step = np.arange(size) if is_neuron else np.zeros(size, np.int64)
    np.testing.assert_array_equal((first[:, None] + step).reshape(-1), owner)
    start = data.draw(st.integers(0, runs))
    stop = data.draw(st.integers(start, runs))
    np.testing.assert_array_equal(layout.run_neurons(start, stop), first[start:stop])


@settings(max_examples=300, deadline=None, database=None)
@given(layouts(least=1))
def test_slabs_are_unbroken_and_hold_whole_vectors(layout: Layout) -> None:
    vectors = vectors_of(layout)
    assert layout.slabs * layout.slab_elements == layout.elements
    assert layout.slabs * layout.neurons_per_slab == layout.count
    assert np.prod([n for _, n in layout.slab_groups], dtype=np.int64) == layout.slab_elements
    for slab in range(layout.slabs):
        neurons = vectors[slab * layout.neurons_per_slab : (slab + 1) * layout.neurons_per_slab]
        expected = np.arange(slab * layout.slab_elements, (slab + 1) * layout.slab_elements)
        np.testing.assert_array_equal(np.sort(neurons.reshape(-1)), expected)


@settings(max_examples=100, deadline=None, database=None)
@given(layouts())
def test_empty_tensors_have_no_slabs_that_matter(layout: Layout) -> None:
    if layout.elements == 0:
        assert layout.slab_elements == 0 or layout.slabs == 0
        assert layout.neurons_per_slab * layout.slabs == layout.count


@pytest.mark.parametrize(
    ("shape", "axes", "groups", "contiguous", "slabs"),
    [
        ((8, 3), (0,), ((True, 8), (False, 3)), True, 8),  # linear
        ((8, 3), (1,), ((False, 8), (True, 3)), False, 1),  # Conv1D
        ((4, 8, 3), (0, 1), ((True, 32), (False, 3)), True, 32),  # experts [E, out, in]
        ((4, 8, 3), (0, 2), ((True, 4), (False, 8), (True, 3)), False, 4),  # experts [E, in, out]
        ((8, 3, 2, 2), (0,), ((True, 8), (False, 12)), True, 8),  # convolution
        ((8, 1, 5), (0,), ((True, 8), (False, 5)), True, 8),
        ((1, 8), (1,), ((True, 8),), True, 8),
        ((8,), (0,), ((True, 8),), True, 8),
        ((), (), (), True, 1),
        ((1, 1), (0,), (), True, 1),
    ],
)
def test_known_tensors(
    shape: tuple[int, ...], axes: tuple[int, ...], groups: object, contiguous: bool, slabs: int
) -> None:
    layout = Layout(shape, axes)
    assert layout.groups == groups
    assert layout.contiguous is contiguous
    assert layout.slabs == slabs


def test_vast_shapes_are_plain_arithmetic() -> None:
    layout = Layout.of([1 << 40, 1 << 40], [1])
    assert (layout.count, layout.width, layout.elements) == (1 << 40, 1 << 40, 1 << 80)


def test_of_takes_any_integers() -> None:
    layout = Layout.of(np.array([4, 3]), [np.int64(0)])
    assert layout == Layout((4, 3), (0,))
    assert type(layout.shape[0]) is int
    assert type(layout.axes[0]) is int


@pytest.mark.parametrize(
    ("shape", "axes"), [((4, 3), (2,)), ((4, 3), (-1,)), ((4, 3), (1, 0)), ((4, 3), (0, 0)), ((), (0,))]
)
def test_axes_that_are_none_are_refused(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not ascending axes of shape"):
        Layout(shape, axes)
