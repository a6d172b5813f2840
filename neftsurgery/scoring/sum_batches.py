"""The sums of a scores file, read for many tensors at a time: few reads, bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tensors.arrays import IndexArray, Int64Array
from ..tensors.reader import TensorFile
from .scored_tensors import ScoredTensor

__all__ = ["SumBatch", "batches", "has_sums"]

_NEURONS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class SumBatch:
    """Consecutive tensors, and their neurons one after the other.

    Attributes
    ----------
    tensors:
        The tensors, each with at least one neuron.
    starts:
        Int64 ``[len(tensors)]``: where each one's neurons begin.
    sums:
        By the name of the sum, a vector over all their neurons, with 0 for NaN and for neurons that the
        anatomy does not count.
    uncounted:
        The same for the neurons that the anatomy does not count; None if it counts all.
    """

    tensors: Sequence[ScoredTensor]
    starts: Int64Array
    sums: Mapping[str, NDArray[Any]]
    uncounted: Mapping[str, NDArray[Any]] | None

    def totals(self, which: str) -> NDArray[Any]:
        """The sums of each tensor."""
        return np.add.reduceat(self.sums[which], self.starts)

    def total(self, which: str, chosen: Mapping[str, IndexArray] | None = None) -> float:
        """The sum over all neurons, or over those in ``chosen``, by tensor.

        If ``chosen`` names all neurons, the two are equal to the bit.
        """
        if chosen is None:
            return float(self.sums[which].sum())
        picked = np.zeros_like(self.sums[which])
        for start, tensor in zip(self.starts, self.tensors, strict=True):
            if tensor.info.name in chosen:
                index = start + chosen[tensor.info.name]
                picked[index] = self.sums[which][index]
        return float(picked.sum())


def has_sums(file: TensorFile, tensor: ScoredTensor, which: Iterable[str]) -> bool:
    """Whether the file holds all of these sums of a tensor."""
    return all(f"{tensor.info.name}:{part}" in file.tensors for part in which)


def batches(file: TensorFile, tensors: Iterable[ScoredTensor], which: Sequence[str]) -> Iterator[SumBatch]:
    """Read the sums ``which``, which all ``tensors`` have, about a million neurons at a time."""
    waiting: list[ScoredTensor] = []
    size = 0
    for tensor in tensors:
        if waiting and size + tensor.layout.count > _NEURONS:
            yield _read(file, waiting, which)
            waiting, size = [], 0
        waiting.append(tensor)
        size += tensor.layout.count
    if waiting:
        yield _read(file, waiting, which)


def _read(file: TensorFile, tensors: Sequence[ScoredTensor], which: Sequence[str]) -> SumBatch:
    counts = [tensor.layout.count for tensor in tensors]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    sums = {part: file.joined([f"{tensor.info.name}:{part}" for tensor in tensors]) for part in which}
    for values in sums.values():
        values[np.isnan(values)] = 0
    masks = [tensor.belongs() for tensor in tensors]
    if all(mask is None for mask in masks):
        return SumBatch(tensors, starts, sums, None)
    counted = np.concatenate(
        [np.ones(n, np.bool_) if mask is None else mask for n, mask in zip(counts, masks, strict=True)]
    )
    uncounted = {part: np.where(counted, 0, values) for part, values in sums.items()}
    return SumBatch(
        tensors, starts, {part: np.where(counted, values, 0) for part, values in sums.items()}, uncounted
    )
