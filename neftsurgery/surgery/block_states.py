"""In which state the blocks of a checkpoint are, with respect to a lossless patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import fingerprint
from ..patch.delta import DeltaBlock, block_state
from ..patch.lossless import LosslessPatch
from ..storage.threads import Limits, in_order
from .model_files import BLOCK_MEMORY, RebuiltWeights, require_result

__all__ = ["examine_blocks", "whole_state"]


def examine_blocks(
    checkpoint: Checkpoint, patch: LosslessPatch, *, limits: Limits, advance: Callable[[int], None]
) -> dict[str, list[int]]:
    """By tensor, how many blocks are the base's, the tuned checkpoint's, both, or neither.

    What the patch makes of the base's blocks is checked too: a `CorruptFileError` says that it is another.
    """
    delta = patch.forward
    counts = {name: [0, 0, 0, 0] for name in delta.tensors}

    def look(block: DeltaBlock) -> int:
        found, digest, whole = block_state(checkpoint, block)
        is_base = digest == int(delta.before[block.number])
        if is_base:
            delta.decoded(block, found)
        is_patched = whole and digest == int(delta.after[block.number])
        return {(True, False): 0, (False, True): 1, (True, True): 2, (False, False): 3}[is_base, is_patched]

    for block, state in in_order(look, delta.blocks, limits.workers(BLOCK_MEMORY)):
        counts[block.info.name][state] += 1
        advance(block.nbytes)
    return counts


def whole_state(
    checkpoint: Checkpoint, patch: LosslessPatch, counts: Mapping[str, Sequence[int]]
) -> Literal["base", "patched", "mixed"]:
    """The state of a checkpoint whose blocks are all known: they do not tell what only one side has.

    Raises as `apply` for a base whose other files are not those that the patch was made with.
    """
    found = fingerprint(checkpoint)
    if found == patch.tuned.fingerprint and not any(one[0] for one in counts.values()):
        return "patched"
    if found == patch.base.fingerprint and not any(one[1] for one in counts.values()):
        target = RebuiltWeights.model(checkpoint, [patch], "patched")
        for read in target.side.values():
            read()
        require_result(fingerprint(target.weights), patch, patch.tuned)
        return "base"
    return "mixed"
