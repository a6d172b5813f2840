"""Where patches meet: neurons in common, whether both have the same base, and one laid over another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import same_files, same_tensor
from ..neurons.layout import Layout
from ..neurons.vectors import find
from ..tensors.arrays import Int64Array, RawBytes
from ..tensors.header import TensorInfo
from ..text import natural_key
from .patch import Patch, PatchTensor

_ELEMENTS = 1 << 18  # that `overlay` looks up at once; each takes some ten words of memory


@dataclass(frozen=True, slots=True)
class RowSource:
    """The vectors to write for one patch: its values, or those they replaced."""

    patch: Patch
    read: Callable[[str, int, int], RawBytes]
    #: Tied tensors that are written as well, by the patch's name of them.
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False)

    def targets(self, checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
        """Each touched tensor, with every tensor of the files that it is."""
        for name in self.patch.tensors:
            yield from ((name, checkpoint.tensors[one]) for one in (name, *self.copies.get(name, ())))


@dataclass(frozen=True, slots=True)
class Meeting:
    """Some patches on one tensor of one shape, dtype and neuron axes."""

    name: str
    holders: tuple[int, ...]  # which of the patches touch the tensor
    union: Int64Array  # the neurons that any of them replaces, ascending
    shared: Int64Array  # those that several replace
    foreign: Int64Array  # those of `shared` whose digests in the base are not the same in all of them


def meetings(patches: Sequence[Patch], names: Iterable[str] | None = None) -> Iterator[Meeting]:
    """Every tensor that patches touch, or those in ``names``: of one shape, dtype and neuron axes each."""
    every = {name for patch in patches for name in patch.tensors} if names is None else set(names)
    for name in sorted(every):
        holders = tuple(n for n, patch in enumerate(patches) if name in patch.tensors)
        if len(holders) == 1:
            none = np.empty(0, np.int64)
            yield Meeting(name, holders, patches[holders[0]].index(name), none, none)
            continue
        index = np.concatenate([patches[n].index(name) for n in holders])
        digests = np.concatenate([patches[n].base_digests(name) for n in holders])
        order = np.argsort(index, kind="stable")
        index, digests = index[order], digests[order]
        again = np.flatnonzero(index[1:] == index[:-1]) + 1
        differs = (digests[again] != digests[again - 1]).any(axis=1)
        foreign = np.unique(index[again[differs]])
        yield Meeting(name, holders, np.unique(index), np.unique(index[again]), foreign)


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two patches have in common."""

    same_base: bool | None  # whether they were made from the same files; None if one does not say
    tensors: list[str]  # those that both touch
    shared: list[str]  # those of `tensors` with a neuron that both replace
    neurons: int  # those that both replace, companion biases not counted
    foreign: int  # those of `neurons` that were not the same in both bases
    crossing: list[str]  # tensors cut along different axes: every neuron of one meets all of the other
    unfit: list[str]  # tensors of another shape or dtype in one than in the other

    @property
    def agree(self) -> bool:
        """Whether nothing says that their bases are different."""
        return self.same_base is not False and not self.foreign and not self.unfit


def overlap(one: Patch, other: Patch) -> Overlap:
    """Compare two patches; reads their indices and digests."""
    both = sorted(one.tensors.keys() & other.tensors.keys(), key=natural_key)
    sides = [(name, one.tensors[name], other.tensors[name]) for name in both]
    unfit = [n for n, a, b in sides if not same_tensor(a.info, b.info)]
    crossing = [n for n, a, b in sides if n not in unfit and a.layout.axes != b.layout.axes]
    found = list(meetings([one, other], set(both) - {*unfit, *crossing}))
    biases = one.facts.companion_biases & other.facts.companion_biases
    return Overlap(
        same_files(one.base, other.base),
        both,
        [meeting.name for meeting in found if len(meeting.shared)],
        sum(len(meeting.shared) for meeting in found if meeting.name not in biases),
        sum(len(meeting.foreign) for meeting in found),
        crossing,
        unfit,
    )


def overlay(vectors: RawBytes, index: Int64Array, tensor: PatchTensor, earlier: Patch) -> None:
    """Put the values of ``earlier`` into ``vectors``, the raw vectors of neurons ``index`` of a tensor."""
    name = tensor.info.name
    theirs, their_index = earlier.tensors[name], earlier.index(name)
    if theirs.layout.axes == tensor.layout.axes:
        slot, hit = find(their_index, index)
        for start, stop in theirs.blocks():
            here = hit & (slot >= start) & (slot < stop)
            if here.any():
                vectors[here] = earlier.values(name, start, stop)[slot[here] - start]
        return
    elements = vectors.view(tensor.info.type.carrier)
    step = max(1, _ELEMENTS // max(1, tensor.layout.width))
    for first in range(0, len(index), step):
        positions = _positions(tensor.layout, index[first : first + step])
        _lay_elements(elements[first : first + step], positions, name, RowSource(earlier, earlier.values))


def lay_over(
    layers: Sequence[RowSource],
    name: str,
    start: int,
    part: memoryview,
    tied: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Put vectors of patches, by this name or one ``tied`` to it, into bytes of a tensor from ``start``."""
    for rows in layers:
        for known in [one for one in (name, *(tied or {}).get(name, ())) if one in rows.patch.tensors][:1]:
            elements = np.frombuffer(part, rows.patch.tensors[known].info.type.carrier)
            first = start // elements.itemsize
            _lay_elements(elements, np.arange(first, first + len(elements)), known, rows)


def _lay_elements(
    elements: NDArray[np.unsignedinteger], positions: Int64Array, name: str, rows: RowSource
) -> None:
    """Replace those of ``elements``, which lie at ``positions`` of a tensor, that are of its vectors."""
    tensor = rows.patch.tensors[name]
    neuron, place = _owner(tensor.layout, positions)
    slot, hit = find(rows.patch.index(name), neuron)
    for start, stop in tensor.blocks():
        here = hit & (slot >= start) & (slot < stop)
        if here.any():
            first, last = int(slot[here].min()), int(slot[here].max())
            values = rows.read(name, first, last + 1).view(tensor.info.type.carrier)
            elements[here] = values[slot[here] - first, place[here]]


def _positions(layout: Layout, index: Int64Array) -> Int64Array:
    """The flat positions in the tensor of the elements of neurons ``index``, ``[k, width]``."""
    shape, axes_of_neurons, others = _axes(layout)
    places = [np.zeros(1, np.int64)] * len(shape)
    inner = np.arange(layout.width, dtype=np.int64)
    for axes, flat in ((axes_of_neurons, index[:, None]), (others, inner)):
        sizes = [shape[axis] for axis in axes]
        for axis, place in zip(axes, np.unravel_index(flat, sizes), strict=True):
            places[axis] = place
    positions: Int64Array = np.ravel_multi_index(places, shape)
    return positions


def _owner(layout: Layout, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Per flat position the neuron it belongs to, and where in that neuron's vector it is."""
    shape, *groups = _axes(layout)
    places = np.unravel_index(positions, shape)
    neuron, place = (
        np.ravel_multi_index([places[axis] for axis in axes], [shape[axis] for axis in axes])
        for axes in groups
    )
    return neuron, place


def _axes(layout: Layout) -> tuple[tuple[int, ...], list[int], list[int]]:
    """The shape, its neuron axes and the others, each behind an axis of size 1: neither group is empty."""
    own = [0, *(axis + 1 for axis in layout.axes)]
    return (1, *layout.shape), own, [0, *(n + 1 for n in range(len(layout.shape)) if n not in layout.axes)]
