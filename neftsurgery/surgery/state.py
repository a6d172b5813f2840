"""In which state a checkpoint is with respect to patches: base, patched, mixed or neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..neurons.vectors import block_memory, gather
from ..patch.digests import DigestHash, digests
from ..patch.overlay import overlay
from ..patch.patch import Patch, Raw
from ..storage.threads import Limits, in_order

__all__ = ["LEFT_BEHIND", "PatchState", "State", "TensorState", "examine", "overall"]

#: What may explain vectors that are neither old nor new.
LEFT_BEHIND = (
    "if the checkpoint was copied or renamed, the journal of a change in place that was cut short may "
    "have been left behind: look for a .neft-journal where it came from, move it along, run neftsurgery heal"
)

State: TypeAlias = Literal["base", "patched", "mixed", "neither"]
Progress: TypeAlias = Callable[[int], None]


@dataclass(slots=True)
class TensorState:
    """How many vectors of one tensor are as in the base, as patched, both (equal), or neither."""

    base: int = 0
    patched: int = 0
    both: int = 0
    neither: int = 0

    @property
    def state(self) -> State:
        """The tensor's state; where base and patched are equal throughout, ``patched``."""
        if self.neither:
            return "neither"
        if self.base and self.patched:
            return "mixed"
        return "base" if self.base else "patched"


@dataclass(slots=True)
class PatchState:
    """The state with respect to one patch, by tensor name."""

    tensors: dict[str, TensorState] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The state of all touched tensors together."""
        return overall(self.tensors.values())

    @property
    def changes_nothing(self) -> bool:
        """Whether old and new vectors are equal throughout."""
        return not any(tensor.base or tensor.patched for tensor in self.tensors.values())


def overall(tensors: Iterable[TensorState]) -> State:
    """The state of several tensors together."""
    total = TensorState()
    for tensor in tensors:
        total.base += tensor.base
        total.patched += tensor.patched
        total.neither += tensor.neither
    return total.state


@dataclass(frozen=True, slots=True)
class _Block:
    patch: int
    name: str
    start: int
    stop: int
    last: bool


def examine(
    checkpoint: Checkpoint,
    patches: Sequence[Patch],
    *,
    limits: Limits,
    progress: Progress | None = None,
) -> list[PatchState]:
    """Compare every touched vector with each patch, and each patch's hashes with its content.

    Each patch is compared with the state that the ones before it leave. A vector that already is
    what it and some that follow make of it counts as patched.

    Raises
    ------
    MismatchError
        If a tensor is missing, or of another shape or dtype.
    CorruptFileError
        If a patch does not match its own hashes.
    """
    for patch in patches:
        patch.require_fit(checkpoint)
    states = [PatchState({name: TensorState() for name in patch.tensors}) for patch in patches]
    hashes = (DigestHash(), DigestHash())
    workers = limits.workers(block_memory(t.layout for patch in patches for t in patch.tensors.values()))

    def look(block: _Block) -> tuple[Raw, Raw, Raw]:
        patch = patches[block.patch]
        tensor = patch.tensors[block.name]
        before = patch.base_digests(block.name, block.start, block.stop)
        patch.check_base_rows(block.name, before, block.start, block.stop)
        reached = patch.values(block.name, block.start, block.stop)
        after = digests(reached)
        index = patch.index(block.name)[block.start : block.stop]
        now = gather(checkpoint, checkpoint.tensors[block.name], tensor.layout, index)
        others = [n for n, other in enumerate(patches) if n != block.patch and block.name in other.tensors]
        if not others:
            return before, after, digests(now)
        settled = (now == reached).all(axis=1)
        for later in (patches[n] for n in others if n > block.patch):
            overlay(reached, index, tensor, later)
            settled |= (now == reached).all(axis=1)  # later ones are in, so this one's trace may be gone
        for earlier in (patches[n] for n in others if n < block.patch):
            overlay(now, index, tensor, earlier)
        return before, after, np.where(settled[:, None], after, digests(now))

    for block, (before, after, now) in in_order(look, _blocks(patches), workers):
        patch = patches[block.patch]
        for state, part in zip(hashes, (before, after), strict=True):
            state.update(part)
        _count(states[block.patch].tensors[block.name], before, after, now)
        if block.last:
            patch.check_hashes(block.name, *hashes)
            hashes = (DigestHash(), DigestHash())
        if progress is not None:
            progress((block.stop - block.start) * patch.tensors[block.name].vector_bytes)
    return states


def _blocks(patches: Sequence[Patch]) -> Iterator[_Block]:
    for number, patch in enumerate(patches):
        for name, tensor in patch.tensors.items():
            if tensor.count == 0:
                yield _Block(number, name, 0, 0, True)
            for start, stop in tensor.blocks():
                yield _Block(number, name, start, stop, stop == tensor.count)


def _count(state: TensorState, before: Raw, after: Raw, now: Raw) -> None:
    is_base, is_patched = (now == before).all(axis=1), (now == after).all(axis=1)
    state.both += int(np.count_nonzero(is_base & is_patched))
    state.base += int(np.count_nonzero(is_base & ~is_patched))
    state.patched += int(np.count_nonzero(is_patched & ~is_base))
    state.neither += int(np.count_nonzero(~is_base & ~is_patched))


def summary(states: Mapping[str, TensorState]) -> dict[str, int]:
    """Tensors by state, for messages and JSON."""
    counts: dict[str, int] = {}
    for tensor in states.values():
        counts[tensor.state] = counts.get(tensor.state, 0) + 1
    return counts
