"""What diff and extract need of a model on either side: a checkpoint, or a base with an adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..sources.resolve import Source
from ..tensors.reader import WeightReader
from .checkpoint import Shard

__all__ = ["Side"]


class Side(WeightReader, Protocol):
    """Weights with a name, and with files that must not change while they are read."""

    @property
    def source(self) -> Source:
        """Where they came from."""

    @property
    def name(self) -> str:
        """As the user named them."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's ``config.json``."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The weight files that hold the tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor data."""

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far, from files that no other side counts."""

    def check_unchanged(self) -> None:
        """Raise a `MachineError` if a file was edited or replaced since it was opened."""
