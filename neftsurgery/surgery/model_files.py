"""A whole model as lossless patches see it: as it is on disk, or as patches make it, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder_files import read_side, side_files
from ..checkpoint.in_memory import TensorsInMemory
from ..checkpoint.provenance import Provenance, fingerprint
from ..coding.elements import BLOCK, Carrier, Elements
from ..errors import CorruptFileError, MismatchError
from ..patch.delta import (
    Delta,
    DeltaBlock,
    SideFile,
    WeightFile,
    block_hash,
    counterpart,
    read_block,
)
from ..patch.lossless import LosslessPatch
from ..sources.resolve import SINGLE_NAME, is_index
from ..tensors.header import FilePlan, parse_header

#: Bytes that a thread holds: a block as it is, as it will be, and its code.
BLOCK_MEMORY = 32 << 20


@dataclass(frozen=True)
class ModelFiles:
    """A model that a lossless patch leads from, or to."""

    weights: Checkpoint | TensorsInMemory | RebuiltWeights
    files: tuple[WeightFile, ...]
    single: bool  # one file, not a folder
    origin: Callable[[], Provenance]
    #: The content of the files beside them that a patch carries.
    side: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    side_bytes: int = 0
    not_carried: tuple[str, ...] = ()  # the names of other files beside them
    base_of: LosslessPatch | None = None  # a patch with whose hashes every block that is read is compared

    @classmethod
    def of(cls, weights: Checkpoint | TensorsInMemory) -> ModelFiles:
        """A checkpoint with its files, or tensors in memory as the file that they would make."""
        if isinstance(weights, Checkpoint):
            carried, others = side_files(weights)
            return cls(
                weights,
                tuple(WeightFile(one.name, one.header, one.raw_header()[8:]) for one in weights.shards),
                weights.is_file,
                lambda: Provenance.of(weights),
                {name: partial(read_side, path) for name, path in carried.items()},
                sum(path.stat().st_size for path in carried.values()),
                others,
            )
        metadata = {"format": "pt"}
        raw = b"".join(FilePlan.of(weights.tensors.values(), metadata).pack(metadata))[8:]
        file = WeightFile(SINGLE_NAME, parse_header(raw, None), raw)
        facts = {"name": weights.name, "fingerprint": fingerprint(weights)}
        return cls(weights, (file,), True, lambda: Provenance(facts))

    def without_side(self) -> ModelFiles:
        """The same without the files beside the weights, all but the indexes."""
        left = tuple(name for name in self.side if not is_index(name))
        kept = {name: read for name, read in self.side.items() if is_index(name)}
        return replace(self, side=kept, not_carried=(*self.not_carried, *left))

    def read(self, block: DeltaBlock) -> Carrier:
        """A block of its files; a `MismatchError` if it is not as in the base of the patch `base_of`."""
        found = read_block(self.weights, block)
        if self.base_of is not None:
            forward = self.base_of.forward
            known = forward.block_at(block.info.name, block.start)
            if (
                known is not None
                and counterpart(known.info, self.weights.tensors) is not None
                and block_hash(found[: len(known)]) != int(forward.before[known.number])
            ):
                raise another_checkpoint(self.base_of, self.weights, block)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.nbytes for file in self.files)


class RebuiltWeights:
    """What deltas of patches make of a checkpoint, each block checked before and after. Thread-safe."""

    #: What is read counts as read from the checkpoint.
    bytes_read = 0

    def __init__(
        self,
        checkpoint: Checkpoint | TensorsInMemory,
        patches: Sequence[LosslessPatch],
        links: Sequence[Delta],
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
        side = {one.name: partial(weights.side_content, one, checkpoint.root) for one in last.side}
        left = patches[-1].not_carried if back is None else ()
        nbytes = sum(one.nbytes for one in last.side)
        return ModelFiles(weights, last.files, last.single, lambda: origin, side, nbytes, left)

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
            found = last[1] if last is not None and last[0] is block else self._made(block)
            self._last = block, found
            part = found.view(np.uint8)[at - block.start * size :][: len(buffer) - done]
            buffer[done : done + len(part)] = part.data
            done += len(part)

    def _made(self, block: DeltaBlock) -> Carrier:
        """A block of what the last link makes. The first link's own block stays, if it is there."""
        path = [block]  # through the links, from the last one to the first that knows the block
        for delta in reversed(self._links[:-1]):
            known = counterpart(path[-1].info, delta.tensors)
            source = None if known is None else delta.block_at(known.name, block.start)
            if source is None:
                break
            path.append(source)
        found: Carrier | None = None
        for delta, one in zip(self._links[-len(path) :], reversed(path), strict=True):
            if delta is self._links[0]:
                found, is_base, is_patched = delta.compared(one, self._checkpoint)
                if not (is_base or is_patched):
                    raise another_checkpoint(self._patches[0], self._checkpoint, block)
                if not is_base:
                    continue
            elif found is not None and len(found) != len(one):  # its rows are more, or fewer, here
                found = np.pad(found, (0, max(0, len(one) - len(found))))[: len(one)]
            found = delta.decoded(one, found)
        assert found is not None
        return found

    def side_content(self, side: SideFile, folder: Path) -> bytes:
        """A file beside the weights: from the last link that holds it, else the checkpoint's own."""

        def source() -> bytes:
            for delta in reversed(self._links[:-1]):
                own = next((one for one in delta.side if one.name == side.name), None)
                if own is None:
                    return b""
                if own.packed:
                    return delta.side_content(own, bytes)
            path = folder / side.name
            return read_side(path) if path.is_file() and path.stat().st_size == side.nbytes else b""

        return self._links[-1].side_content(side, source)


def another_checkpoint(
    patch: LosslessPatch, weights: Checkpoint | TensorsInMemory | RebuiltWeights, block: DeltaBlock
) -> MismatchError:
    """The error for a block that is neither as before the patch nor as after it."""
    return MismatchError(
        f"{patch.name} was made from another checkpoint",
        file=weights.name,
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
