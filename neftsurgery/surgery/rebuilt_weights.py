"""What lossless patches make of a checkpoint, block by block, where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..coding.blocks import BLOCK
from ..coding.elements import Carrier, Elements
from ..errors import CorruptFileError, MismatchError
from ..patch.delta import Delta, DeltaBlock, SideFile, block_state, counterpart
from ..patch.lossless import LosslessPatch
from .model_files import ModelFiles, Weights

__all__ = ["BLOCK_MEMORY", "RebuiltWeights", "another_checkpoint", "require_result"]

#: Bytes that a thread holds: a block as it is, as it will be, and its code.
BLOCK_MEMORY = 32 << 20


class RebuiltWeights:
    """The tensors that deltas of patches, one after the other, make of a checkpoint. Thread-safe.

    Every block is checked against its hashes, before and after each delta.
    """

    #: What is read counts as read from the checkpoint.
    bytes_read = 0

    def __init__(
        self, checkpoint: Checkpoint, patches: Sequence[LosslessPatch], links: Sequence[Delta]
    ) -> None:
        self._checkpoint, self._patches, self._links = checkpoint, patches, links
        self._last: tuple[DeltaBlock, Carrier] | None = None
        self.name = patches[-1].name
        self.tensors = links[-1].tensors

    @classmethod
    def model(cls, checkpoint: Checkpoint, patches: Sequence[LosslessPatch], goal: str) -> ModelFiles:
        """What all ``patches`` make of it; with the goal ``base``, what the last one was made from."""
        back = patches[-1].backward if goal == "base" else None
        links = [patch.forward for patch in patches] if back is None else [back]
        weights, last = cls(checkpoint, patches, links), links[-1]
        origin: Provenance = patches[-1].tuned if back is None else patches[-1].base
        side = {one.name: partial(weights.side_content, one) for one in last.side}
        left = patches[-1].not_carried if back is None else ()
        nbytes = sum(one.nbytes for one in last.side)
        return ModelFiles(weights, last.files, last.single, side, nbytes, left, lambda: origin)

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if the checkpoint or a patch was edited since it was opened."""
        self._checkpoint.check_unchanged()
        for patch in self._patches:
            patch.check_unchanged()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""
        size, done = Elements.of(self.tensors[name].dtype).size, 0
        while done < len(buffer):
            at = start + done
            block = self._links[-1].block_at(name, at // size // BLOCK * BLOCK)
            assert block is not None  # of a tensor of the target
            last = self._last  # both ends of a small tensor are in one block
            found = last[1] if last is not None and last[0] is block else self.block(block)
            self._last = block, found
            part = found.view(np.uint8)[at - block.start * size :][: len(buffer) - done]
            buffer[done : done + len(part)] = part.data
            done += len(part)

    def block(self, block: DeltaBlock) -> Carrier:
        """A block of what all links make, from what each makes of it. What is the result's already, stays."""
        ways = [(self._links[-1], block)]
        for delta in reversed(self._links[:-1]):
            info = counterpart(ways[-1][1].info, delta.tensors)
            source = None if info is None else delta.block_at(info.name, block.start)
            if source is None:
                break
            ways.append((delta, source))
        found: Carrier | None = None
        if len(ways) == len(self._links):
            delta, one = ways.pop()
            found = delta.made(one, *block_state(self._checkpoint, one))
            if found is None:
                raise another_checkpoint(self._patches[0], self._checkpoint, block)
        for delta, one in reversed(ways):
            source_elements = None
            if found is not None:
                source_elements = np.zeros(one.stop - one.start, one.elements.carrier)
                there = min(len(found), len(source_elements))
                source_elements[:there] = found[:there]
            found = delta.decoded(one, source_elements)
        assert found is not None
        return found

    def side_content(self, side: SideFile) -> bytes:
        """A file beside the weights: from the last link that holds it, else the checkpoint's own."""

        def source() -> bytes:
            for delta in reversed(self._links[:-1]):
                own = next((one for one in delta.side if one.name == side.name), None)
                if own is None:
                    return b""
                if own.packed:
                    return delta.side_content(own, bytes)
            path = self._checkpoint.root / side.name
            return path.read_bytes() if path.is_file() and path.stat().st_size == side.nbytes else b""

        return self._links[-1].side_content(side, source)


def another_checkpoint(patch: LosslessPatch, checkpoint: Weights, block: DeltaBlock) -> MismatchError:
    """The error for a block that is neither as before the patch nor as after it."""
    return MismatchError(
        f"{patch.name} was made from another checkpoint",
        file=checkpoint.name,
        tensor=block.info.name,
        hint="nothing was written; `neftsurgery verify` shows every tensor's state",
    )


def require_result(found: str, patch: LosslessPatch, expected: Provenance) -> None:
    """Raise a `CorruptFileError` unless the fingerprint of what a patch makes is the one that it records."""
    if found != expected.fingerprint:
        raise CorruptFileError(
            "the patch does not make the checkpoint that it names",
            file=patch.place,
            expected=f"fingerprint {expected.fingerprint}",
            found=found,
            hint="nothing was written; the patch is damaged or was altered: fetch it again",
        )
