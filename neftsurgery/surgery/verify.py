"""verify: whether a checkpoint is in the state before a patch, after it, or in neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Unpack

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import fingerprint
from ..errors import boundary
from ..neurons.vectors import block_memory, gather
from ..options import RunOptions
from ..patch.delta import DeltaBlock, block_state
from ..patch.digests import DigestHash, digests
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.overlap import overlay
from ..patch.patch import Patch
from ..progress import Progress, Stopwatch, Timing, silent
from ..storage.output_checks import AnyPath
from ..storage.threads import Limits, in_order
from ..tensors.arrays import RawBytes
from ..text import plural
from .verb import run_keywords

__all__ = [
    "JOURNAL_HINT",
    "PatchState",
    "TensorState",
    "Verification",
    "VerifyPlan",
    "examine",
    "plan_verify",
    "summary",
    "verify",
]

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
    already what this patch, or this one and some that follow, make of it. Raises as `verify`.
    """
    for patch in patches:
        patch.require_fit(checkpoint)
    states = [PatchState({name: TensorState() for name in patch.tensors}) for patch in patches]
    hashes = (DigestHash(), DigestHash())
    workers = limits.workers(
        block_memory((t.layout for patch in patches for t in patch.tensors.values()), limits.block)
    )

    def compare(block: _Block) -> tuple[RawBytes, RawBytes, RawBytes]:
        patch = patches[block.patch]
        tensor = patch.tensors[block.name]
        before = patch.base_digests(block.name, block.start, block.stop)
        patch.check_base_rows(block.name, before, block.start, block.stop)
        reached = patch.values(block.name, block.start, block.stop)
        after = digests(reached)
        index = patch.index(block.name)[block.start : block.stop]
        now = gather(checkpoint, checkpoint.tensors[block.name], tensor.layout, index, block=limits.block)
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

    for block, (before, after, now) in in_order(compare, _blocks(patches, limits.block), workers):
        patch = patches[block.patch]
        for state, part in zip(hashes, (before, after), strict=True):
            state.update(part)
        _count(states[block.patch].tensors[block.name], before, after, now)
        if block.last:
            patch.check_hashes(block.name, *hashes)
            hashes = (DigestHash(), DigestHash())
        advance((block.stop - block.start) * patch.tensors[block.name].vector_bytes)
    return states


def _blocks(patches: Sequence[Patch], size: int | None) -> Iterator[_Block]:
    for number, patch in enumerate(patches):
        for name, tensor in patch.tensors.items():
            if tensor.count == 0:
                yield _Block(number, name, 0, 0, True)
            for start, stop in tensor.blocks(size):
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


def examine_blocks(
    checkpoint: Checkpoint, patch: LosslessPatch, *, limits: Limits, advance: Callable[[int], None]
) -> tuple[State, dict[str, TensorState]]:
    """Compare every block with both of its hashes, and all tensors with both fingerprints."""
    delta = patch.forward
    tensors = {name: TensorState() for name in delta.tensors}

    def look(block: DeltaBlock) -> tuple[bool, bool]:
        _, state, whole = block_state(checkpoint, block)
        return state == int(delta.before[block.number]), whole and state == int(delta.after[block.number])

    for block, (is_base, is_patched) in in_order(look, delta.blocks, limits.threads):
        tensor = tensors[block.info.name]
        tensor.both += is_base and is_patched
        tensor.base += is_base and not is_patched
        tensor.patched += is_patched and not is_base
        tensor.neither += not is_base and not is_patched
        advance(block.nbytes)
    state = PatchState(tensors).state
    if state in ("base", "patched"):
        # Blocks do not tell which tensors only one side has.
        whole = fingerprint(checkpoint)
        if whole == patch.tuned.fingerprint and not any(t.base for t in tensors.values()):
            state = "patched"
        elif whole == patch.base.fingerprint and not any(t.patched for t in tensors.values()):
            state = "base"
        else:
            state = "mixed"
    return state, tensors


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    state:
        Of all touched tensors together: ``base``, ``patched``, ``mixed`` or ``neither``. If the patch changes
        no bit, both ``base`` and ``patched`` hold, and the state is ``patched``.
    tensors:
        How many vectors are in which state, by touched tensor.
    """

    state: State
    tensors: dict[str, TensorState]
    timing: Timing = field(default_factory=Timing)
    #: What was compared: neurons, or blocks of a lossless patch.
    unit: str = "neuron"

    @property
    def neurons(self) -> int:
        """How many vectors or blocks were compared."""
        return sum(t.base + t.patched + t.both + t.neither for t in self.tensors.values())

    def __str__(self) -> str:
        return f"{self.state}: {plural(self.neurons, self.unit)} in {plural(len(self.tensors), 'tensor')}"

    def __repr__(self) -> str:
        return f"<Verification {self}>"

    def holds(self, expected: str | None = None) -> bool:
        """Whether all vectors are in the state ``expected``; None: all in the base, or all patched."""
        if expected is None:
            return self.state in ("base", "patched")
        wrong = "patched" if expected == "base" else "base"
        return not any(tensor.neither or getattr(tensor, wrong) for tensor in self.tensors.values())


@dataclass(frozen=True)
class VerifyPlan:
    """A checkpoint, and a patch that fits it. Made by `plan_verify`."""

    checkpoint: Checkpoint
    patch: Patch | LosslessPatch

    def describe(self) -> dict[str, object]:
        """For JSON."""
        facts = {"checkpoint": self.checkpoint.name, "patch": self.patch.name}
        if isinstance(self.patch, LosslessPatch):
            return {**facts, "lossless": True, "tensors": list(self.patch.forward.tensors)}
        return {**facts, "neurons": self.patch.neurons, "tensors": list(self.patch.tensors)}

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Verification:
        """Compare every vector that the patch touches; of a lossless patch, every block."""
        watch, limits = Stopwatch(), limits or Limits.of()
        lossless = isinstance(self.patch, LosslessPatch)
        total = (
            self.patch.forward.block_bytes
            if isinstance(self.patch, LosslessPatch)
            else self.patch.value_bytes
        )
        with watch.running(), progress("checking", total) as advance:
            if isinstance(self.patch, LosslessPatch):
                state, tensors = examine_blocks(self.checkpoint, self.patch, limits=limits, advance=advance)
            else:
                (found,) = examine(self.checkpoint, [self.patch], limits=limits, advance=advance)
                state, tensors = found.state, found.tensors
            self.checkpoint.check_unchanged()
            self.patch.check_unchanged()
        watch.bytes_read = self.checkpoint.bytes_read
        return Verification(state, tensors, watch.timing, "block" if lossless else "neuron")


@boundary
def verify(
    checkpoint: AnyPath,
    patch: AnyPatch,
    **options: Unpack[RunOptions],
) -> Verification:
    """Compare every vector that a patch touches with its state before and after; or every block.

    Parameters
    ----------
    checkpoint, patch:
        A checkpoint, and a patch or its path.
    threads, memory, progress:
        As in `diff`.

    Raises
    ------
    MismatchError
        If a tensor is missing, or of another shape or dtype.
    CorruptFileError
        If the patch does not match its own hashes, or a file is damaged.
    """
    return plan_verify(checkpoint, patch).run(**run_keywords("verify", options))


def plan_verify(checkpoint: AnyPath, patch: AnyPatch) -> VerifyPlan:
    """Read the headers of both and check that they fit each other."""
    opened = Checkpoint.open(checkpoint)
    loaded = load_any(patch)
    if isinstance(loaded, Patch):
        loaded.require_fit(opened)
    return VerifyPlan(opened, loaded)
