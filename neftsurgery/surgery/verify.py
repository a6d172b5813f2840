"""verify: whether a checkpoint is in the state before a patch, after it, or in neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import file_notes
from ..checkpoint.provenance import fingerprint
from ..checkpoint.ties import stored_ties
from ..errors import UsageError, boundary
from ..neurons.vectors import block_memory, gather
from ..options import RunAnywhereOptions
from ..patch.delta import DeltaBlock
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.overlap import RowSource, overlay
from ..patch.patch import Patch
from ..patch.patch_file import DigestHash, digests
from ..progress import Progress, Stopwatch, Timing, silent
from ..selection.selection import RowBlock
from ..storage.output_checks import AnyPath
from ..storage.threads import Dispatch, Limits, Seen, in_order
from ..tensors.arrays import RawBytes
from ..tensors.dtypes import DType
from ..text import plural
from .model_files import BLOCK_MEMORY, RebuiltWeights, require_result
from .verb import run_keywords, same_bases, warn

State = Literal["base", "patched", "mixed", "neither"]


@dataclass(slots=True)
class TensorState:
    """How many vectors, or blocks, of one tensor are in which state; both: base and patched are equal."""

    base: int = 0
    patched: int = 0
    both: int = 0
    neither: int = 0

    def add(self, is_base: bool | NDArray[np.bool_], is_patched: bool | NDArray[np.bool_]) -> None:
        """Count some more, of which it is known whether they are as in the base, and as patched."""
        both = int(np.count_nonzero(is_base & is_patched))
        base, patched = int(np.count_nonzero(is_base)) - both, int(np.count_nonzero(is_patched)) - both
        self.base, self.patched, self.both = self.base + base, self.patched + patched, self.both + both
        self.neither += np.size(is_base) - base - patched - both

    @property
    def state(self) -> State:
        """The tensor's state; ``patched`` if base and patched are equal throughout."""
        if self.neither:
            return "neither"
        if self.base and self.patched:
            return "mixed"
        return "base" if self.base else "patched"


def examine_blocks(
    checkpoint: Checkpoint, patch: LosslessPatch, *, limits: Limits, advance: Callable[[int], None]
) -> dict[str, TensorState]:
    """The state of every tensor, by its blocks; a `CorruptFileError` if the patch makes another of one."""
    delta = patch.forward
    states = {name: TensorState() for name in delta.tensors}
    look, dispatch = partial(_look, checkpoint, patch), _dispatch(checkpoint, patch, limits)
    workers, size = limits.workers(BLOCK_MEMORY), attrgetter("nbytes")
    for block, found in in_order(look, delta.blocks, workers, nbytes=size, dispatch=dispatch):
        states[block.info.name].add(*found)
        advance(block.nbytes)
    return states


def _look(checkpoint: Checkpoint, patch: LosslessPatch, block: DeltaBlock) -> tuple[bool, bool]:
    """Whether a block is as in the base, and as patched."""
    found, is_base, is_patched = patch.forward.compared(block, checkpoint)
    if is_base:
        patch.forward.decoded(block, found)
    return is_base, is_patched


def whole_state(checkpoint: Checkpoint, patch: LosslessPatch, states: Mapping[str, TensorState]) -> State:
    """The state of a checkpoint whose blocks are all known, by what only one side has. Raises as `apply`."""
    found = fingerprint(checkpoint)
    if found == patch.tuned.fingerprint and not any(one.base for one in states.values()):
        return "patched"
    if found == patch.base.fingerprint and not any(one.patched for one in states.values()):
        target = RebuiltWeights.model(checkpoint, [patch], "patched")
        for read in target.side.values():
            read()
        require_result(fingerprint(target.weights), patch, patch.tuned)
        return "base"
    return "mixed"


#: A possible reason for vectors that are neither old nor new.
JOURNAL_HINT = (
    "if the checkpoint was copied or renamed after a change in place was interrupted, its .neft-journal may "
    "still be at the old place: move it beside the weights and run neftsurgery heal"
)

#: Neurons that hold fewer different numbers than this do not tell models apart: rows of zeros or ones, or a
#: handful of norm weights or biases, are alike in models that have nothing to do with each other.
TELLING: Final = 16
_ELEMENTS = 4096  # looked at in one go, until there are enough numbers


@dataclass(slots=True)
class PatchState:
    """The state with respect to one patch, by tensor name."""

    tensors: dict[str, TensorState] = field(default_factory=dict)
    same_base: bool | None = None  # whether, without the patch, it has the fingerprint of the patch's base
    applied: bool = False  # whether the checkpoint itself holds any new vector of the patch
    numbers: set[int] = field(default_factory=set)  # that the compared neurons hold, as bits: enough of them

    @property
    def tells_models_apart(self) -> bool:
        """Whether the compared neurons can tell models apart; see `TELLING`."""
        return len(self.numbers) >= TELLING

    @property
    def remark(self) -> str | None:
        """What speaks against the patch having been made for this checkpoint, or is not known of that."""
        if self.tells_models_apart:
            other = "its fingerprint is not the base's: something besides the patch's neurons differs"
            return other if self.same_base is False else None
        if self.same_base:
            return None
        known = "cannot be compared" if self.same_base is None else "is another"
        return (
            f"this may not be the model that the patch is for: its fingerprint {known}, and the neurons "
            f"of the patch hold fewer than {TELLING} different numbers, which do not tell models apart"
        )

    @property
    def state(self) -> State:
        """The state of all touched tensors together."""
        counts = ((one.base, one.patched, one.both, one.neither) for one in self.tensors.values())
        return TensorState(*map(sum, zip(*counts, strict=True))).state

    def is_done(self, goal: str) -> bool:
        """Whether all vectors are in the state ``goal``, or old and new ones are equal throughout."""
        changed = any(tensor.base or tensor.patched for tensor in self.tensors.values())
        return self.state == goal or not changed


def examine(
    checkpoint: Checkpoint,
    patches: Sequence[Patch],
    *,
    replaced: Sequence[RowSource] | None = None,
    limits: Limits,
    advance: Callable[[int], None],
) -> list[PatchState]:
    """Compare every touched vector with each patch, and each patch's hashes with its content.

    Each is compared with the state that those before it leave; a vector counts as patched if it is what this
    patch, or this one and some that follow, make of it. ``replaced``: the vectors that the patches replaced,
    where others have them than the patches. Raises as `verify`.
    """
    states = [PatchState({name: TensorState() for name in patch.tensors}) for patch in patches]
    layouts = (tensor.layout for patch in patches for tensor in patch.tensors.values())
    workers = limits.workers(block_memory(layouts, limits.block))
    dispatch = _dispatch(checkpoint, patches[0], limits)
    compare = partial(_compare, checkpoint, patches, states, limits.block)
    blocks = ((n, block) for n, patch in enumerate(patches) for block in patch.blocks(limits.block))
    found = in_order(compare, blocks, workers, nbytes=lambda one: one[1].nbytes, dispatch=dispatch)
    with closing(found) as compared:
        for (number, name), group in groupby(compared, key=lambda one: (one[0][0], one[0][1].name)):
            hashes, state = (DigestHash(), DigestHash()), states[number]
            for (_, block), (before, after, now, more) in group:
                for digest, part in zip(hashes, (before, after), strict=True):
                    digest.update(part)
                state.tensors[name].add((now == before).all(axis=1), (now == after).all(axis=1))
                state.applied = state.applied or more.applied
                state.numbers |= set() if state.tells_models_apart else more.numbers
                advance(block.nbytes)
            patches[number].check_hashes(name, *hashes)
    if replaced is None:
        replaced = [RowSource(patch, patch.base_values) for patch in reversed(patches) if patch.reversible]
    same = same_bases(checkpoint, patches, [state.applied for state in states], replaced)
    return [replace(state, same_base=one) for state, one in zip(states, same, strict=True)]


def _compare(
    checkpoint: Checkpoint,
    patches: Sequence[Patch],
    states: Sequence[PatchState],
    size: int | None,
    one: tuple[int, RowBlock],
) -> tuple[RawBytes, RawBytes, RawBytes, PatchState]:
    """The digests of a block before and after its patch, and now; and what else it tells of the state."""
    (number, block), found = one, PatchState()
    patch = patches[number]
    tensor = patch.tensors[block.name]
    before = patch.base_digests(block.name, block.start, block.stop)
    patch.check_base_rows(block.name, before, block.start, block.stop)
    reached = patch.values(block.name, block.start, block.stop)
    after = digests(reached)
    index = patch.index(block.name)[block.start : block.stop]
    now = gather(checkpoint, checkpoint.tensors[block.name], tensor.layout, index, block=size)
    others = [n for n, other in enumerate(patches) if n != number and block.name in other.tensors]
    settled = (now == reached).all(axis=1)
    found.applied = bool((settled & (before != after).any(axis=1)).any())
    for later in (patches[n] for n in others if n > number):
        overlay(reached, index, tensor, later)
        settled |= (now == reached).all(axis=1)  # later patches may have replaced this one's values
    for earlier in (patches[n] for n in others if n < number):
        overlay(now, index, tensor, earlier)
    if not states[number].tells_models_apart:
        _note_numbers(now, tensor.info.type, found.numbers)
    return before, after, np.where(settled[:, None], after, digests(now)), found


def _dispatch(checkpoint: Checkpoint, patch: Patch | LosslessPatch, limits: Limits) -> Dispatch | None:
    """How the executor of ``limits``, if any, looks at blocks."""
    if limits.executor is not None and patch.path is None:
        raise UsageError("other processes cannot see a patch without a file", hint="save the patch first")
    nbytes = patch.forward.block_bytes if isinstance(patch, LosslessPatch) else patch.value_bytes
    again = partial(_again, checkpoint.source.address, patch.seen[0])
    return limits.dispatch(again, (*checkpoint.seen, patch.seen), nbytes)


def _again(checkpoint: str, patch: str) -> tuple[Callable[[Any], Any], Seen]:
    """What looks at a block in another process, and the files that it sees."""
    plan = plan_verify(checkpoint, patch)
    seen = (*plan.checkpoint.seen, plan.patch.seen)
    if isinstance(plan.patch, LosslessPatch):
        return partial(_look, plan.checkpoint, plan.patch), seen
    return partial(_compare, plan.checkpoint, [plan.patch], [PatchState()], None), seen


def _note_numbers(vectors: RawBytes, dtype: DType, numbers: set[int]) -> None:
    """Add the elements of ``vectors`` to ``numbers``, until there are `TELLING` of them."""
    elements = vectors.view(dtype.carrier).reshape(-1)
    for start in range(0, len(elements), _ELEMENTS):
        if len(numbers) < TELLING:
            numbers.update([*set(elements[start : start + _ELEMENTS].tolist())][:TELLING])


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found."""

    # Of all touched tensors together. If the patch changes no bit, the state is ``patched``.
    state: State
    tensors: dict[str, TensorState]  # how many vectors are in which state, by touched tensor
    neurons: int  # that were compared, without companion biases; of a lossless patch, blocks
    # Whether the checkpoint, without the patch, has the fingerprint of the patch's base. None if the patch
    # does not record it, or does not hold what it replaced.
    same_base: bool | None = None
    remark: str | None = None  # what speaks against the patch having been made for this checkpoint
    timing: Timing = field(default_factory=Timing)
    unit: str = "neuron"  # what was compared: ``neuron`` or ``block``

    def __str__(self) -> str:
        said = f"{self.state}: {plural(self.neurons, self.unit)} in {plural(len(self.tensors), 'tensor')}"
        return said if self.remark is None else f"{said}\n{self.remark}"

    def __repr__(self) -> str:
        return f"<Verification {str(self).splitlines()[0]}>"

    def holds(self, expected: str | None = None) -> bool:
        """Whether all vectors are in the state ``expected``; None: all in the base, or all patched."""
        if expected is None:
            return self.state in ("base", "patched")
        wrong = "patched" if expected == "base" else "base"
        clear = self.state in ("base", "patched")
        return clear and not any(one.neither or getattr(one, wrong) for one in self.tensors.values())


@dataclass(frozen=True)
class VerifyPlan:
    """A checkpoint, and a patch that fits it. Made by `plan_verify`."""

    checkpoint: Checkpoint
    patch: Patch | LosslessPatch
    warnings: Sequence[str] = ()  # sentences for the user

    def run(self, *, limits: Limits | None = None, progress: Progress = silent) -> Verification:
        """Compare every vector that the patch touches, or every block of a lossless one."""
        limits, checkpoint, patch = limits or Limits.of(), self.checkpoint, self.patch
        nbytes = patch.forward.block_bytes if isinstance(patch, LosslessPatch) else patch.value_bytes
        with Stopwatch() as watch, progress("checking", nbytes) as advance:
            if isinstance(patch, LosslessPatch):
                tensors = examine_blocks(checkpoint, patch, limits=limits, advance=advance)
                state = PatchState(tensors).state
                if state in ("base", "patched"):
                    state = whole_state(checkpoint, patch, tensors)
                found = Verification(state, tensors, len(patch.forward.blocks), unit="block")
            else:
                (now,) = examine(checkpoint, [patch], limits=limits, advance=advance)
                remark = None if now.state == "neither" else now.remark
                found = Verification(now.state, now.tensors, patch.neurons, now.same_base, remark)
            checkpoint.check_unchanged()
            patch.check_unchanged()
        watch.bytes_read = checkpoint.bytes_read + (nbytes if isinstance(patch, Patch) else 0)
        return replace(found, timing=watch.timing)


@boundary
def verify(
    checkpoint: AnyPath,
    patch: AnyPatch,
    **options: Unpack[RunAnywhereOptions],
) -> Verification:
    """Compare every vector that a patch touches, or every block, with its state before and after.

    A lossless patch is decoded, too: if the checkpoint is its base, `apply` will succeed.

    Args:
        checkpoint, patch: A checkpoint, and a patch or its path.
        threads, memory, executor, progress: As in `diff`.

    Raises:
        MismatchError: If a tensor is missing, or of another shape or dtype.
        CorruptFileError: If the patch does not match its own hashes, or a file is damaged.
    """
    plan = plan_verify(checkpoint, patch)
    warn(__name__, plan.warnings)
    return plan.run(**run_keywords("verify", options))


def plan_verify(checkpoint: AnyPath, patch: AnyPatch) -> VerifyPlan:
    """Read the headers of both and check that they fit each other."""
    loaded = load_any(patch)
    if isinstance(loaded, LosslessPatch):
        return VerifyPlan(Checkpoint.open(checkpoint), loaded)
    fitting = loaded.require_fit(Checkpoint.open(checkpoint))
    _, notes = stored_ties(fitting, (fitting.tensors[name].name for name in loaded.tensors))
    return VerifyPlan(fitting, loaded, (*notes, *file_notes(fitting)))
