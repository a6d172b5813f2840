"""Where the neurons of one tensor lie, and how files describe that: arithmetic on shapes, no I/O.

A tensor of shape ``S`` has *neuron axes* ``A``, an ascending subset of its axes. Neuron ``i`` runs
row-major over ``A``; its *vector* is the slice at those coordinates, flattened row-major over the
other axes. In memory and on disk the tensor is row-major over all of ``S``.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..tensors.document import bad
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile

_MAX_AXES = 64
_MAX_ELEMENTS = 1 << 62


@dataclass(frozen=True)
class Layout:
    """The neurons of a tensor of ``shape`` along ``axes``; a ValueError if these are not ascending ones."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(b <= a for a, b in zip(self.axes, self.axes[1:], strict=False)) or any(
            not 0 <= axis < len(self.shape) for axis in self.axes
        ):
            raise ValueError(
                f"neuron axes {list(self.axes)} are not ascending axes of shape {list(self.shape)}"
            )

    @classmethod
    def of(cls, shape: Sequence[int], axes: Sequence[int]) -> Layout:
        """The layout of any two sequences; equal ones share one object and its cached properties."""
        return _shared(tuple(shape), tuple(axes))

    @cached_property
    def elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @cached_property
    def count(self) -> int:
        """Neurons of the tensor."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @cached_property
    def width(self) -> int:
        """Elements of one neuron's vector."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @cached_property
    def groups(self) -> tuple[tuple[bool, int], ...]:
        """The axes without those of size 1, neighbours of one kind merged: ``(is a neuron axis, size)``.

        A linear weight is ``((True, out), (False, in))``; a ``Conv1D`` weight ``((False, in), (True, out))``.
        """
        sizes = [(axis in self.axes, size) for axis, size in enumerate(self.shape) if size != 1]
        groups = itertools.groupby(sizes, key=operator.itemgetter(0))
        return tuple((is_neuron, math.prod(size for _, size in group)) for is_neuron, group in groups)

    @property
    def contiguous(self) -> bool:
        """Whether each vector is one unbroken range of the tensor: element ``i * width`` onwards."""
        return len(self.groups) < 2 or (len(self.groups) == 2 and self.groups[0][0])

    @cached_property
    def run(self) -> tuple[bool, int]:
        """The innermost group: ``(True, n)``, n neighbours are n neurons; ``(False, n)``, one neuron.

        A tensor is a sequence of ``elements // n`` such runs.
        """
        return self.groups[-1] if self.groups else (False, 1)

    def run_neurons(self, start: int, stop: int) -> NDArray[np.int64]:
        """The neuron of the first element of each of the runs ``[start, stop)``, shape ``[stop - start]``."""
        runs = np.arange(start, stop, dtype=np.int64)
        neuron = np.zeros(len(runs), dtype=np.int64)
        is_neuron, size = self.run
        stride = size if is_neuron else 1
        for is_neuron, size in reversed(self.groups[:-1]):
            if is_neuron:
                neuron += (runs % size) * stride
                stride *= size
            runs //= size
        return neuron

    @cached_property
    def slab_groups(self) -> tuple[tuple[bool, int], ...]:
        """The `groups` of one slab: all but an outermost neuron group; see `slabs`."""
        return self.groups[1:] if self.groups and self.groups[0][0] else self.groups

    @cached_property
    def slabs(self) -> int:
        """How many equal ranges of the tensor hold whole vectors: the steps of an outermost neuron group.

        Such a *slab* is an expert of ``[E, in, out]`` with axes 0 and 2. A ``Conv1D`` weight is one slab.
        """
        return self.groups[0][1] if self.groups and self.groups[0][0] else 1

    @cached_property
    def neurons_per_slab(self) -> int:
        """Neurons of one slab."""
        return self.count // self.slabs if self.slabs else 0

    @cached_property
    def slab_elements(self) -> int:
        """Elements of one slab."""
        return self.elements // self.slabs if self.slabs else 0


@functools.lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...], axes: tuple[int, ...]) -> Layout:
    return Layout(tuple(int(n) for n in shape), tuple(int(a) for a in axes))


def described(info: TensorInfo, axes: Sequence[int] | None = None) -> dict[str, object]:
    """What files and JSON say of a tensor and, if it has any, of its neurons; see `described_tensor`."""
    facts: dict[str, object] = {"shape": list(info.shape), "dtype": info.dtype}
    return facts if axes is None else facts | {"neuron_axes": list(axes)}


def described_tensor(file: TensorFile, what: str, name: str, entry: object) -> tuple[TensorInfo, Layout]:
    """A tensor's shape, dtype and neuron axes, from its entry; a `CorruptFileError` if one is wrong."""
    if not isinstance(entry, dict):
        raise bad(file, what, "its description is not an object", name)
    shape, dtype, axes = entry.get("shape"), entry.get("dtype"), entry.get("neuron_axes")
    if not _naturals(shape) or not _naturals(axes) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(file, what, "its shape, dtype or neuron_axes are missing or make no sense", name)
    if len(shape) > _MAX_AXES or len(axes) > len(shape) or math.prod(shape) >= _MAX_ELEMENTS:
        raise bad(file, what, "its shape has too many axes or elements", name)
    if DTYPES[dtype].bits % 8:
        raise bad(file, what, f"{dtype} elements do not fill whole bytes", name)
    try:
        return TensorInfo(name, dtype, tuple(shape)), Layout.of(shape, axes)
    except ValueError as error:
        raise bad(file, what, str(error), name) from error


def _naturals(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not {int}.issuperset(map(type, value)):  # a bool is an int, too
        return False
    return not value or (min(value) >= 0 and max(value) < 1 << 63)
