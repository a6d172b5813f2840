"""A whole model as lossless patches see it: weight files with their headers, and the files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.in_memory import TensorsInMemory
from ..checkpoint.provenance import Provenance, fingerprint
from ..checkpoint.side_files import side_files
from ..checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from ..coding.elements import Carrier
from ..patch.delta import DeltaBlock, WeightFile, read_block
from ..tensors.header import FilePlan, parse_header
from ..tensors.reader import TensorReader

__all__ = ["ModelFiles", "Weights", "read_whole", "weight_file"]


class Weights(TensorReader, Protocol):
    """The tensors of a model, wherever they are."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if what it is read from was edited since it was opened."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that a lossless patch leads from, or to."""

    weights: Weights
    files: tuple[WeightFile, ...]
    single: bool  # one file, not a folder
    side: Mapping[
        str, Callable[[], bytes]
    ]  # the files beside the weights that a patch carries: their content
    side_bytes: int
    not_carried: tuple[str, ...]  # names of those that it does not
    origin: Callable[[], Provenance]

    @classmethod
    def of(cls, weights: Checkpoint | TensorsInMemory) -> ModelFiles:
        """A checkpoint with its files, or tensors in memory as the file that they would make."""
        if isinstance(weights, Checkpoint):
            carried, others = side_files(weights)
            return cls(
                weights,
                tuple(weight_file(shard) for shard in weights.shards),
                weights.is_file,
                {path.name: path.read_bytes for path in carried},
                sum(path.stat().st_size for path in carried),
                others,
                lambda: Provenance.of(weights),
            )
        metadata = {"format": "pt"}
        raw = b"".join(FilePlan.of(weights.tensors.values(), metadata).pack(metadata))[8:]
        file = WeightFile(SINGLE_NAME, parse_header(raw, None), raw)
        return cls(
            weights,
            (file,),
            True,
            {},
            0,
            (),
            lambda: Provenance({"name": weights.name, "fingerprint": fingerprint(weights)}),
        )

    def without_side(self) -> ModelFiles:
        """The same without the files beside the weights, all but the index."""
        left = tuple(name for name in self.side if name != INDEX_NAME)
        kept = {name: read for name, read in self.side.items() if name == INDEX_NAME}
        return replace(self, side=kept, not_carried=(*self.not_carried, *left))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.nbytes for file in self.files)


def weight_file(shard: Shard) -> WeightFile:
    """A weight file of a checkpoint, with its header."""
    with open(shard.path, "rb") as file:
        file.seek(8)
        return WeightFile(shard.path.name, shard.header, file.read(shard.header.size - 8))


def read_whole(weights: TensorReader, block: DeltaBlock) -> Carrier:
    """A block of weights that have all of it."""
    found = read_block(weights, block)
    assert found is not None
    return found[0]
