"""The state of a checkpoint with respect to patches: base, patched, mixed or neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..neurons.vectors import block_memory, gather
from ..patch.digests import DigestHash, digests
from ..patch.overlap import overlay
from ..patch.patch import Patch
from ..storage.threads import Limits, in_order
from ..tensors.arrays import RawBytes

__all__ = ["JOURNAL_HINT", "PatchState", "State", "TensorState", "examine"]

#: A possible reason for vectors that are neither old nor new.
JOURNAL_HINT = (
    "if the checkpoint was copied or renamed after a change in place was interrupted, its .neft-journal may "
    "still be at the old place: move it beside the weights and run neftsurgery heal"
)

State = Literal["base", "patched", "mixed", "neither"]


@dataclass(slots=True)
class TensorState:
    """How many vectors of one tensor are in which state; both: base and patched are equal."""

    base: int = 0
    patched: int = 0
    both: int = 0
    neither: int = 0

    @property
    def state(self) -> State:
        """The tensor's state; ``patched`` if base and patched are equal throughout."""
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
        total = TensorState()
        for tensor in self.tensors.values():
            total.base += tensor.base
            total.patched += tensor.patched
            total.neither += tensor.neither
        return total.state

    @property
    def changes_nothing(self) -> bool:
        """Whether old and new vectors are equal throughout."""
        return not any(tensor.base or tensor.patched for tensor in self.tensors.values())


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
    advance: Callable[[int], None],
) -> list[PatchState]:
    """Compare every touched vector with each patch, and each patch's hashes with its content.

    Each patch is compared with the state that those before it leave. A vector counts as patched if it is
    already what this patch, or this one and some that follow, make of it.

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

    def compare(block: _Block) -> tuple[RawBytes, RawBytes, RawBytes]:
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
            settled |= (now == reached).all(axis=1)  # later patches may have replaced this one's values
        for earlier in (patches[n] for n in others if n < block.patch):
            overlay(now, index, tensor, earlier)
        return before, after, np.where(settled[:, None], after, digests(now))

    for block, (before, after, now) in in_order(compare, _blocks(patches), workers):
        patch = patches[block.patch]
        for state, part in zip(hashes, (before, after), strict=True):
            state.update(part)
        _count(states[block.patch].tensors[block.name], before, after, now)
        if block.last:
            patch.check_hashes(block.name, *hashes)
            hashes = (DigestHash(), DigestHash())
        advance((block.stop - block.start) * patch.tensors[block.name].vector_bytes)
    return states


def _blocks(patches: Sequence[Patch]) -> Iterator[_Block]:
    for number, patch in enumerate(patches):
        for name, tensor in patch.tensors.items():
            if tensor.count == 0:
                yield _Block(number, name, 0, 0, True)
            for start, stop in tensor.blocks():
                yield _Block(number, name, start, stop, stop == tensor.count)


def _count(state: TensorState, before: RawBytes, after: RawBytes, now: RawBytes) -> None:
    is_base, is_patched = (now == before).all(axis=1), (now == after).all(axis=1)
    state.both += int(np.count_nonzero(is_base & is_patched))
    state.base += int(np.count_nonzero(is_base & ~is_patched))
    state.patched += int(np.count_nonzero(is_patched & ~is_base))
    state.neither += int(np.count_nonzero(~is_base & ~is_patched))


def summary(states: Mapping[str, TensorState]) -> dict[str, int]:
    """Tensors by state, for messages and JSON."""
    return dict(Counter(tensor.state for tensor in states.values()))
