"""The protocols by which weights are read, wherever they are: local files, adapters, converted tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .arrays import IndexArray, RawBytes
from .header import TensorInfo

__all__ = ["RowReader", "WeightReader"]


class RowReader(Protocol):
    """The bytes of named tensors, by range or by rows, read into buffers of the caller."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""

    def read_rows(self, name: str, rows: IndexArray, out: RawBytes) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of tensor ``name``."""


class WeightReader(RowReader, Protocol):
    """All that scoring sees of a model. Thread-safe."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors, by name."""

    def window(self, name: str, start: int, size: int) -> RawBytes | None:
        """Bytes of tensor ``name`` that are in memory already, mapped instead of read; else None."""
