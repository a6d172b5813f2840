"""In which state a checkpoint is, with respect to a patch: its vectors, or its blocks and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import fingerprint
from ..patch.delta import DeltaBlock
from ..patch.lossless import LosslessPatch
from ..storage.threads import Limits, in_order
from .model_files import BLOCK_MEMORY, RebuiltWeights, require_result

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
        self.base += int(np.count_nonzero(is_base > is_patched))
        self.patched += int(np.count_nonzero(is_base < is_patched))
        self.both += int(np.count_nonzero(is_base & is_patched))
        self.neither += int(np.count_nonzero(np.logical_not(is_base | is_patched)))

    @property
    def state(self) -> State:
        """The tensor's state; ``patched`` if base and patched are equal throughout."""
        if self.neither:
            return "neither"
        if self.base and self.patched:
            return "mixed"
        return "base" if self.base else "patched"


def summary(states: Mapping[str, TensorState]) -> dict[str, int]:
    """Tensors by state, for messages and JSON."""
    return dict(Counter(tensor.state for tensor in states.values()))


def examine_blocks(
    checkpoint: Checkpoint, patch: LosslessPatch, *, limits: Limits, advance: Callable[[int], None]
) -> dict[str, TensorState]:
    """The state of every tensor of the tuned checkpoint, by its blocks.

    What the patch makes of the base's blocks is checked too: a `CorruptFileError` says that it is another.
    """
    delta = patch.forward
    states = {name: TensorState() for name in delta.tensors}

    def look(block: DeltaBlock) -> tuple[bool, bool]:
        found, is_base, is_patched = delta.compared(block, checkpoint)
        if is_base:
            delta.decoded(block, found)
        return is_base, is_patched

    for block, found in in_order(look, delta.blocks, limits.workers(BLOCK_MEMORY)):
        states[block.info.name].add(*found)
        advance(block.nbytes)
    return states


def whole_state(checkpoint: Checkpoint, patch: LosslessPatch, states: Mapping[str, TensorState]) -> State:
    """The state of a checkpoint whose blocks are all known: they do not tell what only one side has.

    Raises as `apply` for a base whose other files are not those that the patch was made with.
    """
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
