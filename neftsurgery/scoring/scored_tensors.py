"""The tensors of a scores file: what it says about each, read and checked; their sums, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..neurons.layout import Layout, described_tensor
from ..neurons.units import CountedSlice
from ..tensors.arrays import IndexArray, Int64Array, Mask
from ..tensors.document import Facts, bad, require_entry
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile

__all__ = [
    "WHAT",
    "CompanionBias",
    "ScoredTensor",
    "SumBatch",
    "Unscored",
    "batches",
    "has_sums",
    "read_companion_biases",
    "read_scored",
]

#: The name of the file in messages.
WHAT = "scores file"
_SUMS = {"base_sq": "F64", "delta_sq": "F64", "dot": "F64", "changed": "I64", "unit": "I64"}
_NEURONS = 1 << 20  # of a batch


@dataclass(frozen=True, slots=True)
class ScoredTensor:
    """One scored tensor."""

    info: TensorInfo
    layout: Layout
    layer: str  # the pool of ``--per layer``; empty outside the layers
    bias: str | None  # the tensor whose elements go with these neurons
    part: CountedSlice | None  # the neurons that the anatomy counts; None: all

    def belongs(self) -> Mask | None:
        """Whether the anatomy counts each neuron; None if it counts all."""
        return None if self.part is None else self.part.mask()


@dataclass(frozen=True, slots=True)
class CompanionBias:
    """A tensor of one-element neurons, whose changes are recorded and not scored."""

    info: TensorInfo
    layout: Layout
    included: bool


@dataclass(frozen=True, slots=True)
class Unscored:
    """A common tensor that was not scored: whether it changed, and by how much, if that has a size."""

    delta_sq: float | None
    changed: bool

    @classmethod
    def from_json(cls, value: object) -> Unscored:
        """Of its entry in the file, which `read_companion_biases` has checked."""
        entry = Facts.from_json(value)
        return cls(entry.number("delta_sq") if "delta_sq" in entry else 0.0, bool(entry.get("changed")))


def read_scored(file: TensorFile, name: str, entry: object) -> ScoredTensor:
    """The scored tensor ``name``, from its entry and the vectors beside it; else a `CorruptFileError`."""
    info, layout = described_tensor(file, WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    if layout.width < 1 or layout.count < 1:
        raise bad(file, WHAT, "a scored tensor has no neurons", name)
    require_entry(file, WHAT, name, "", "F32", (layout.count,))
    _check_sums(file, name, _SUMS, layout)
    layer, bias, part = entry.get("layer", ""), entry.get("bias"), entry.get("part")
    if not isinstance(layer, str) or not (bias is None or isinstance(bias, str)):
        raise bad(file, WHAT, "its layer or bias is not a name", name)
    if part is not None and not (
        isinstance(part, list)
        and len(part) == 3
        and layout.axes
        and all(isinstance(n, int) and n >= 0 for n in part)
        and part[2]
    ):
        raise bad(file, WHAT, "its part is not three numbers", name)
    if part is not None:
        inner = info.shape[layout.axes[-1]]
        part = CountedSlice(layout.count // inner, inner, *part)
    return ScoredTensor(info, layout, layer, bias, part)


def _check_sums(file: TensorFile, name: str, which: Iterable[str], layout: Layout) -> None:
    for part in which:
        if f"{name}:{part}" in file.tensors:
            require_entry(file, WHAT, name, part, _SUMS[part], (layout.count,))


def read_companion_biases(
    file: TensorFile, unscored: object, tensors: Mapping[str, ScoredTensor]
) -> Iterator[tuple[str, CompanionBias]]:
    """The unscored tensors whose changes are recorded element by element."""
    if not isinstance(unscored, dict):
        raise bad(file, WHAT, "unscored is not an object")
    counts: dict[str | None, set[int]] = {}
    for tensor in tensors.values():
        counts.setdefault(tensor.bias, set()).add(tensor.layout.count)
    for name, entry in sorted(unscored.items()):
        if not isinstance(entry, dict) or name in tensors:
            raise bad(file, WHAT, "its entry of an unscored tensor makes no sense", name)
        delta = 0.0 if entry.get("delta_sq") is None else entry["delta_sq"]
        if not isinstance(delta, int | float) or not 0 <= delta <= float(np.finfo(np.float64).max):
            raise bad(file, WHAT, "its delta_sq is not a sum of squares", name)
        if f"{name}:changed" in file.tensors:
            info, layout = described_tensor(file, WHAT, name, entry)
            _check_sums(file, name, ("changed", "delta_sq"), layout)
            if counts.get(name, {layout.count}) != {layout.count}:
                raise bad(file, WHAT, "a bias does not have as many neurons as its weight", name)
            yield name, CompanionBias(info, layout, entry.get("included") is True)


@dataclass(frozen=True, slots=True, eq=False)
class SumBatch:
    """Consecutive tensors, and their neurons one after the other."""

    tensors: Sequence[ScoredTensor]  # each with at least one neuron
    starts: Int64Array  # ``[len(tensors)]``: where each one's neurons begin
    # By the name of the sum, a vector over all their neurons, with 0 for NaN and for neurons that the anatomy
    # does not count.
    sums: Mapping[str, NDArray[Any]]
    uncounted: Mapping[str, NDArray[Any]] | None  # the same for these neurons; None if there are none

    def totals(self, which: str) -> NDArray[Any]:
        """The sums of each tensor."""
        return np.add.reduceat(self.sums[which], self.starts)

    def total(self, which: str, chosen: Mapping[str, IndexArray] | None = None) -> float:
        """The sum over all neurons, or those in ``chosen`` by tensor; equal to the bit if that is all."""
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
    inside = {part: np.where(counted, values, 0) for part, values in sums.items()}
    uncounted = {part: np.where(counted, 0, values) for part, values in sums.items()}
    return SumBatch(tensors, starts, inside, uncounted)
