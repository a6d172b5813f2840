"""Where patches meet: neurons in common, and whether both were made from the same base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint.provenance import same_files, same_tensor
from ..tensors.arrays import Int64Array
from .patch import Patch

__all__ = ["Meeting", "Overlap", "meetings", "overlap"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Some patches on one tensor of one shape, dtype and neuron axes.

    Attributes
    ----------
    name:
        The tensor.
    holders:
        Which of the patches touch it.
    union:
        The neurons that any of them replaces, ascending.
    shared:
        Those that several replace.
    foreign:
        Those of ``shared`` whose digests in the base are not the same in all of them.
    """

    name: str
    holders: tuple[int, ...]
    union: Int64Array
    shared: Int64Array
    foreign: Int64Array


def meetings(patches: Sequence[Patch], names: Iterable[str] | None = None) -> Iterator[Meeting]:
    """Every tensor that any of the patches touches, by name; or those in ``names``.

    The tensor's shape, dtype and neuron axes must be the same in all of them that touch it.
    """
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
    """What two patches have in common.

    Attributes
    ----------
    same_base:
        Whether they say that they were made from the same files; None if one does not say.
    tensors:
        Tensors that both touch.
    neurons, foreign:
        Neurons that both replace; those of them that were not the same in both bases.
    crossing:
        Tensors that they cut along different axes: every neuron of one meets every one of the other.
    unfit:
        Tensors that have another shape or dtype in one than in the other.
    """

    same_base: bool | None
    tensors: tuple[str, ...]
    neurons: int
    foreign: int
    crossing: tuple[str, ...]
    unfit: tuple[str, ...]

    @property
    def agree(self) -> bool:
        """Whether nothing says that their bases are different."""
        return self.same_base is not False and not self.foreign and not self.unfit


def overlap(one: Patch, other: Patch) -> Overlap:
    """Compare two patches; reads their indices and digests."""
    both = tuple(sorted(one.tensors.keys() & other.tensors.keys()))
    sides = [(name, one.tensors[name], other.tensors[name]) for name in both]
    unfit = tuple(n for n, a, b in sides if not same_tensor(a.info, b.info))
    crossing = tuple(n for n, a, b in sides if n not in unfit and a.layout.axes != b.layout.axes)
    found = list(meetings([one, other], set(both) - {*unfit, *crossing}))
    return Overlap(
        same_files(one.base, other.base),
        both,
        sum(len(meeting.shared) for meeting in found),
        sum(len(meeting.foreign) for meeting in found),
        crossing,
        unfit,
    )
