"""The tensors of a scores file: what it says about each, read and checked; where their numbers lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..neurons.anatomy import NeuronTensor
from ..neurons.layout import Layout, described_tensor
from ..neurons.units import CountedSlice
from ..tensors.arrays import Float32Array, IndexArray, Int64Array
from ..tensors.document import Facts, bad, require_entry
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile

#: The name of the file in messages.
WHAT = "scores file"
#: The kinds of numbers, and their dtypes in version 2. In version 1 ``changed`` is I64.
_KINDS = {"score": "F32", "base_sq": "F64", "delta_sq": "F64", "dot": "F64", "changed": "U32", "unit": "I64"}
#: Version 2 has all of these, or none.
SUMS = ("base_sq", "delta_sq", "dot", "changed")
_OF_ELEMENTS = ("delta_sq", "changed")  # what is recorded of companion biases as well
_NEURONS = 1 << 20  # of a batch


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


def read_all_scored(file: TensorFile, entries: Mapping[str, object]) -> dict[str, NeuronTensor]:
    """The scored tensors, by name in order, from their descriptions; one that several share is read once."""
    found, known = dict[str, NeuronTensor](), dict[int, NeuronTensor]()
    for name, entry in sorted(entries.items()):
        like = known.get(id(entry))
        if like is None:
            found[name] = known[id(entry)] = read_scored(file, name, entry)
        else:
            found[name] = replace(like, info=replace(like.info, name=name))
    return found


def read_scored(file: TensorFile, name: str, entry: object) -> NeuronTensor:
    """The scored tensor ``name``, from its description; else a `CorruptFileError`."""
    info, layout = described_tensor(file, WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    if layout.width < 1 or layout.count < 1:
        raise bad(file, WHAT, "a scored tensor has no neurons", name)
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
    return NeuronTensor(info, layout.axes, layer, "", bias, part=part)


def read_companion_biases(
    file: TensorFile, facts: Mapping[str, Any], tensors: Mapping[str, NeuronTensor]
) -> dict[str, CompanionBias]:
    """The unscored tensors whose changes are recorded element by element, by name."""
    unscored, found = facts.get("unscored", {}), dict[str, CompanionBias]()
    if not isinstance(unscored, dict):
        raise bad(file, WHAT, "unscored is not an object")
    counts: dict[str, set[int]] = {}
    for tensor in tensors.values():
        if tensor.bias is not None:
            counts.setdefault(tensor.bias, set()).add(tensor.layout.count)
    for name, entry in sorted(unscored.items()):
        if not isinstance(entry, dict) or name in tensors:
            raise bad(file, WHAT, "its entry of an unscored tensor makes no sense", name)
        delta = 0.0 if entry.get("delta_sq") is None else entry["delta_sq"]
        if not isinstance(delta, int | float) or not 0 <= delta <= float(np.finfo(np.float64).max):
            raise bad(file, WHAT, "its delta_sq is not a sum of squares", name)
        if "neuron_axes" in entry if facts["version"] > 1 else f"{name}:changed" in file.tensors:
            info, layout = described_tensor(file, WHAT, name, entry)
            if counts.get(name, {layout.count}) != {layout.count}:
                raise bad(file, WHAT, "a bias does not have as many neurons as its weight", name)
            found[name] = CompanionBias(info, layout, entry.get("included") is True)
    return found


def arranged(
    counts: Mapping[str, int], elements: Mapping[str, int], kinds: Iterable[str]
) -> tuple[dict[str, int], list[TensorInfo]]:
    """Where each tensor's numbers begin in the arrays of version 2, and the entries of these arrays.

    ``counts``: how many neurons each scored tensor has; ``elements``: the same of companion biases.
    """
    ordered = dict([*sorted(counts.items()), *sorted(elements.items())])
    edges = [0, *accumulate(ordered.values())]
    lengths = {which: edges[-1 if which in _OF_ELEMENTS else len(counts)] for which in kinds}
    entries = [TensorInfo(which, _KINDS[which], (length,)) for which, length in lengths.items()]
    return dict(zip(ordered, edges, strict=False)), entries


@dataclass(frozen=True, slots=True)
class ScoreRange:
    """Some of the scores of a file of version 2, read by slices."""

    file: TensorFile
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice, /) -> Float32Array:
        first, last, _ = part.indices(self.count)
        return self.file.array("score", self.start + first, self.start + last)


@dataclass(frozen=True, slots=True)
class ScoreArrays:
    """The numbers of a scores file, read when asked for.

    Version 2 has an array per kind, with the numbers of tensor after tensor; ``starts`` says where a tensor's
    begin. Version 1 has an entry per tensor and kind, and no ``starts``.
    """

    file: TensorFile
    starts: Mapping[str, int] | None

    @classmethod
    def checked(
        cls,
        file: TensorFile,
        facts: Mapping[str, object],
        tensors: Mapping[str, NeuronTensor],
        companion_biases: Mapping[str, CompanionBias],
    ) -> ScoreArrays:
        """Those of ``file``; a `CorruptFileError` if its entries do not fit the tensors."""
        counts = {name: tensor.layout.count for name, tensor in tensors.items()}
        elements = {name: bias.layout.count for name, bias in companion_biases.items()}
        if facts["version"] == 1:
            for group, kinds in ((counts, _KINDS), (elements, _OF_ELEMENTS)):
                for (name, count), which in product(group.items(), kinds):
                    if which == "score" or f"{name}:{which}" in file.tensors:
                        dtype = "I64" if which == "changed" else _KINDS[which]
                        own = name if which == "score" else f"{name}:{which}"
                        require_entry(file, WHAT, TensorInfo(own, dtype, (count,)))
            return cls(file, None)
        sums = SUMS if any(which in file.tensors for which in SUMS) else ()
        unit = ["unit"] if facts.get("anatomy") == "units" or "unit" in file.tensors else []
        starts, entries = arranged(counts, elements, ["score", *sums, *unit])
        for entry in entries:
            require_entry(file, WHAT, entry)
        return cls(file, starts)

    def having(self, tensors: Iterable[NeuronTensor], *kinds: str) -> list[NeuronTensor]:
        """Those of the scored ``tensors`` that have all of these numbers."""
        if self.starts is None:
            return [tensor for tensor in tensors if self.has(tensor.info.name, *kinds)]
        return list(tensors) if self.file.tensors.keys() >= set(kinds) else []

    def has(self, name: str, *kinds: str) -> bool:
        """Whether it has all of these numbers of a tensor."""
        entries = self.file.tensors
        if self.starts is None:
            return all(_entry(name, which) in entries for which in kinds)
        shortest = min(entries[which].shape[0] if which in entries else 0 for which in kinds)
        return self.starts.get(name, shortest) < shortest

    def scores(self, tensors: Sequence[NeuronTensor]) -> ScoreRange | Float32Array:
        """The scores of tensors that follow each other; many are read when they are asked for."""
        count = sum(tensor.layout.count for tensor in tensors)
        if self.starts is None or count <= _NEURONS:
            return self.read("score", tensors)
        return ScoreRange(self.file, self.starts[tensors[0].info.name], count)

    def read(self, which: str, tensors: Sequence[NeuronTensor | CompanionBias]) -> NDArray[Any]:
        """One kind of numbers of tensors that follow each other and have it, one after the other."""
        if self.starts is None:
            values = np.concatenate([self.file.array(_entry(tensor.info.name, which)) for tensor in tensors])
        else:
            start = self.starts[tensors[0].info.name]
            values = self.file.array(which, start, start + sum(tensor.layout.count for tensor in tensors))
        if which.endswith("_sq") and (values < 0).any():
            raise bad(self.file, WHAT, f"{which} is negative", tensors[0].info.name)
        return values.astype(np.int64, copy=False) if which == "changed" else values


def _entry(name: str, which: str) -> str:
    """The name of an entry in version 1."""
    return name if which == "score" else f"{name}:{which}"


@dataclass(frozen=True, slots=True, eq=False)
class SumBatch:
    """Consecutive tensors, and their neurons one after the other."""

    tensors: Sequence[NeuronTensor]  # each with at least one neuron
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
        names = [tensor.info.name for tensor in self.tensors]
        starts = zip(names, self.starts.tolist(), strict=True)
        if found := [start + chosen[name] for name, start in starts if name in chosen]:
            index = np.concatenate(found)
            picked[index] = self.sums[which][index]
        return float(picked.sum())


def batches(
    numbers: ScoreArrays, tensors: Iterable[NeuronTensor], which: Sequence[str]
) -> Iterator[SumBatch]:
    """Read the sums ``which`` of those ``tensors`` that have them, about a million neurons at a time."""
    having = numbers.having(tensors, *which)
    ends = accumulate(tensor.layout.count for tensor in having)
    for _, group in groupby(zip(having, ends, strict=True), key=lambda one: one[1] // _NEURONS):
        yield _read(numbers, [tensor for tensor, _ in group], which)


def _read(numbers: ScoreArrays, tensors: Sequence[NeuronTensor], which: Sequence[str]) -> SumBatch:
    counts = [tensor.layout.count for tensor in tensors]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    sums = {part: numbers.read(part, tensors) for part in which}
    for values in sums.values():
        values[np.isnan(values)] = 0
    if all(tensor.part is None for tensor in tensors):
        return SumBatch(tensors, starts, sums, None)
    counted = np.concatenate([tensor.counted() for tensor in tensors])
    inside = {part: np.where(counted, values, 0) for part, values in sums.items()}
    uncounted = {part: np.where(counted, 0, values) for part, values in sums.items()}
    return SumBatch(tensors, starts, inside, uncounted)
