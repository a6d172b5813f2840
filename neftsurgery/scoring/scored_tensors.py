"""The tensors of a scores file: what it says about each, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import CorruptFileError
from ..neurons.description import described_tensor
from ..neurons.layout import Layout
from ..tensors.arrays import Mask
from ..tensors.document import Facts, bad
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile

__all__ = [
    "WHAT",
    "CompanionBias",
    "ScoredTensor",
    "Unscored",
    "check_vector",
    "read_companion_biases",
    "read_scored",
]

#: The name of the file in messages.
WHAT = "scores file"


@dataclass(frozen=True, slots=True)
class ScoredTensor:
    """One scored tensor.

    Attributes
    ----------
    info, layout:
        The tensor and its neurons.
    layer:
        The pool of ``--per layer``; empty outside the layers.
    bias:
        The tensor whose elements go with these neurons.
    part:
        ``(start, stop, step)`` along the last neuron axis, if the anatomy counts only these neurons.
    """

    info: TensorInfo
    layout: Layout
    layer: str
    bias: str | None
    part: tuple[int, int, int] | None

    def belongs(self) -> Mask | None:
        """Whether the anatomy counts each neuron; None if it counts all."""
        if self.part is None:
            return None
        inner = self.info.shape[self.layout.axes[-1]]
        mask = np.zeros((self.layout.count // inner, inner), np.bool_)
        mask[:, slice(*self.part)] = True
        return mask.reshape(-1)


@dataclass(frozen=True, slots=True)
class CompanionBias:
    """A tensor of one-element neurons, whose changes are recorded and not scored.

    It goes with the neurons of its weight. If ``included``, the user named it, and it may be any such tensor.
    """

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
    """The scored tensor ``name``, from its entry in ``tensors`` and the vectors beside it.

    Raises
    ------
    CorruptFileError
        If one is missing, or they do not fit each other.
    """
    info, layout = described_tensor(file, WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    if layout.width < 1 or layout.count < 1:
        raise bad(file, WHAT, "a scored tensor has no neurons", name)
    check_vector(file, name, "F32", layout.count)
    for which, dtype in (("base_sq", "F64"), ("delta_sq", "F64"), ("dot", "F64"), ("changed", "I64")):
        if f"{name}:{which}" in file.tensors:
            check_vector(file, f"{name}:{which}", dtype, layout.count)
    if f"{name}:unit" in file.tensors:
        check_vector(file, f"{name}:unit", "I64", layout.count)
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
    return ScoredTensor(info, layout, layer, bias, None if part is None else (part[0], part[1], part[2]))


def check_vector(file: TensorFile, name: str, dtype: str, count: int) -> None:
    """Raise a `CorruptFileError` unless entry ``name`` is a vector of ``count`` elements of ``dtype``."""
    entry = file.tensors.get(name)
    if entry is None or entry.dtype != dtype or entry.shape != (count,):
        raise CorruptFileError(
            f"a damaged {WHAT}",
            file=file.path,
            tensor=name,
            expected=f"{dtype} [{count}]",
            found=entry.describe() if entry else "nothing",
        )


def read_companion_biases(
    file: TensorFile, unscored: object, tensors: Mapping[str, ScoredTensor]
) -> Iterator[tuple[str, CompanionBias]]:
    """The unscored tensors whose changes the file records element by element.

    Raises
    ------
    CorruptFileError
        If the file's entry of an unscored tensor makes no sense.
    """
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
            check_vector(file, f"{name}:changed", "I64", layout.count)
            if f"{name}:delta_sq" in file.tensors:
                check_vector(file, f"{name}:delta_sq", "F64", layout.count)
            if counts.get(name, {layout.count}) != {layout.count}:
                raise bad(file, WHAT, "a bias does not have as many neurons as its weight", name)
            yield name, CompanionBias(info, layout, entry.get("included") is True)
