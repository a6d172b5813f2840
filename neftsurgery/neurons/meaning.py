"""What a tensor's name says of it: whether it counts, its axes, its layer, its block, its bias."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..tensors.header import TensorInfo
from .families import FeedForward
from .roles import Role
from .scopes import Scope

__all__ = [
    "COLUMNS",
    "UNKNOWN_EXPERTS",
    "Meaning",
    "bias_of",
    "block_key",
    "meaning_of",
    "member_axes",
    "place",
]

_OUTPUT_AXES: dict[str, tuple[int, ...]] = {
    "out in": (0,),
    "in out": (1,),
    "E out in": (0, 1),
    "E in out": (0, 2),
}
_INPUT_AXES: dict[str, tuple[int, ...]] = {
    "out in": (1,),
    "in out": (0,),
    "E out in": (0, 2),
    "E in out": (0, 1),
}
COLUMNS = ("down", "o")
_NORM = re.compile(r"(^|_)ln(_|\d|$)|norm\d*$|layer_?norm|layrnorm", re.IGNORECASE)
UNKNOWN_EXPERTS = "experts of unknown orientation: give their axes with --axis"
_MOST_AXES = 5


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name says, the same in every layer and for every expert.

    ``reason`` is why the tensor is left out, "" if it counts; ``axes`` those of its output units,
    None if not known; ``open`` whether ``axis`` alone makes it count.
    """

    reason: str
    axes: tuple[int, ...] | None
    scope: Scope
    role: Role | None = None
    open: bool = False
    assumed: bool = False


def meaning_of(pattern: tuple[str, ...], ndim: int, scope: Scope) -> Meaning:
    """What a name says of a tensor of ``ndim`` axes; ``pattern`` are its parts with ``*`` for numbers."""
    if pattern[-1].endswith("bias"):
        return Meaning("bias", None, scope)
    stem = pattern[:-1] if pattern[-1] == "weight" and len(pattern) > 1 else pattern
    role = scope.role(stem)
    if role is not None and role.what != "weight":
        return Meaning(role.what, (0,), scope)
    if role is not None and ndim >= 2:
        if ndim != (3 if role.layout.startswith("E") else 2):
            return Meaning(f"{ndim} axes, its family has another number", None, scope, open=True)
        axes = _OUTPUT_AXES.get(role.layout)
        return Meaning("" if axes else UNKNOWN_EXPERTS, axes, scope, role, open=axes is None)
    if (scope.sure or ndim < 2) and _NORM.search(stem[-1]):
        return Meaning("norm", None, scope)
    if ndim > 2 and any("expert" in part for part in pattern):
        return Meaning(UNKNOWN_EXPERTS, None, scope, open=True)
    if ndim > _MOST_AXES:
        return Meaning("too many axes for a linear or convolution weight", None, scope, open=True)
    if scope.sure and pattern[-1] != "weight" and ndim >= 2:
        return Meaning("not a linear or convolution weight", (0,), scope, open=True)
    return Meaning("", (0,), scope, assumed=not scope.sure)


def member_axes(role: Role, meaning: Meaning) -> tuple[int, ...] | None:
    """The axes of the neurons that a member gives its block: columns of down and o, else rows."""
    return _INPUT_AXES.get(role.layout) if role.member in COLUMNS else meaning.axes


def place(parts: Sequence[str]) -> tuple[str, str]:
    """Layer and kind of a name, given as its parts; see `neftsurgery.neurons.anatomy.NeuronTensor`."""
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    layer = "" if first is None else ".".join(parts[: first + 1])
    rest = list(parts if first is None else parts[first + 1 :])
    if len(rest) > (first is None) and rest[-1] == "weight":
        rest.pop()
    for index in range(1, len(rest)):
        if rest[index].isdecimal() and "expert" in rest[index - 1]:
            rest[index] = "*"
    return layer, ".".join(rest or parts[:first])


def bias_of(info: TensorInfo, axes: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor of one element per neuron that is added to what the neurons give."""
    stem, dot, last = info.name.rpartition(".")
    if last in ("weight", "kernel") and dot:
        name = f"{stem}.bias"
    elif last.endswith("_weight"):
        name = info.name.removesuffix("weight") + "bias"
    else:
        name = f"{info.name}_bias"
    found = tensors.get(name)
    return name if found is not None and found.shape == tuple(info.shape[axis] for axis in axes) else None


def block_key(parts: Sequence[str], role: Role) -> tuple[str, str]:
    """What the tensors of one block, and no others, have in common."""
    stem = parts[:-1] if parts[-1] == "weight" else parts
    container = ".".join(stem[: len(stem) - role.depth + role.container])
    return ("feed-forward" if isinstance(role.block, FeedForward) else "attention", container)
