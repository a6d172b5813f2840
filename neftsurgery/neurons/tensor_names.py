"""What a tensor's name says: whether it counts, its axes, layer, block, bias. Patterns are ``fnmatch``'s."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..tensors.header import TensorInfo
from .families import FeedForward
from .submodels import Role, Submodel

#: By the order of a weight's axes, those of its output units and those of its input units.
_AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "out in": ((0,), (1,)),
    "in out": ((1,), (0,)),
    "E out in": ((0, 1), (0, 2)),
    "E in out": ((0, 2), (0, 1)),
}
COLUMNS = ("down", "o")
_NORM = re.compile(r"(^|_)ln(_|\d|$)|norm\d*$|layer_?norm|layrnorm", re.IGNORECASE)
UNKNOWN_EXPERTS = "experts of unknown orientation"
UNKNOWN_LAYER = "a weight of an unknown layer"
_MOST_AXES = 5
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class NameReading:
    """What a name says: the same in every layer and for every expert."""

    reason: str  # why the tensor is left out; empty if it counts
    axes: tuple[int, ...] | None  # those of its output units; None if not known
    submodel: Submodel
    role: Role | None = None
    needs_axis: bool = False  # whether the option ``axis`` alone makes it count
    assumed: bool = False  # whether `axes` are a guess, as the model is not known


def name_pattern(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts of a name, with ``*`` for numbers: of layers, of experts, not of one in a ``Sequential``."""
    last = len(parts) - (2 if parts[-1] in ("weight", "bias") else 1)
    return tuple("*" if part.isdecimal() and at != last else part for at, part in enumerate(parts))


def read_name(pattern: tuple[str, ...], ndim: int, submodel: Submodel) -> NameReading:
    """What a name says about a tensor of ``ndim`` axes; ``pattern`` is its `name_pattern`."""
    if pattern[-1].endswith("bias"):
        return NameReading("bias", None, submodel)
    stem = pattern[:-1] if pattern[-1] == "weight" and len(pattern) > 1 else pattern
    role = submodel.role(stem)
    if role is not None and role.what not in ("weight", "other"):
        return NameReading(role.what, (0,), submodel)
    if role is not None and role.what == "weight" and ndim >= 2:
        if not _fits(role, ndim):
            return NameReading(
                f"{ndim} axes, which its family does not expect", None, submodel, needs_axis=True
            )
        axes = _AXES[role.order][0] if role.order in _AXES else None
        return NameReading("" if axes else UNKNOWN_EXPERTS, axes, submodel, role, needs_axis=axes is None)
    known = submodel.fully_known
    if role is None and (known or ndim < 2) and _NORM.search(stem[-1]):
        return NameReading("norm", None, submodel)
    if ndim < 2 or (ndim == 2 and role is None and (not known or pattern[-1] == "weight")):
        return NameReading("", (0,), submodel, assumed=not known)
    if ndim > 2 and any("expert" in part for part in stem[-2:]):
        reason = UNKNOWN_EXPERTS
    elif role is None and (not known or pattern[-1] == "weight"):
        reason = f"{UNKNOWN_LAYER} ({ndim} axes)"
    else:
        reason = "not a linear or convolution weight"
    return NameReading(reason, None, submodel, needs_axis=True, assumed=not known)


def _fits(role: Role, ndim: int) -> bool:
    """Whether a weight can have ``ndim`` axes: units are known of linear layers alone."""
    if role.order.startswith("E"):
        return ndim == 3
    return ndim == 2 if role.block is not None else ndim <= _MOST_AXES


def member_axes(role: Role, reading: NameReading) -> tuple[int, ...] | None:
    """The neuron axes of a member of a block: columns of down and o, else rows."""
    if role.member not in COLUMNS:
        return reading.axes
    return _AXES[role.order][1] if role.order in _AXES else None


def split_layer(name: str) -> tuple[str, str, str]:
    """A name up to its first number, up to there with it (its layer), and what is behind."""
    found = _NUMBER.search(name)
    if found is None:
        return "", "", name
    return name[: found.start()], name[: found.end(1)], name[found.end() :]


def layer_and_kind(name: str) -> tuple[str, str]:
    """The layer and kind of a name: see `neftsurgery.neurons.anatomy.NeuronTensor`."""
    before, layer, rest = split_layer(name)
    return layer, (_kind(rest, bool(layer)) if rest else "") or before


@functools.lru_cache(maxsize=1 << 14)
def _kind(name: str, in_layer: bool) -> str:
    rest = name.split(".")
    if len(rest) > (not in_layer) and rest[-1] == "weight":
        rest.pop()
    for index in range(1, len(rest)):
        if rest[index].isdecimal() and "expert" in rest[index - 1]:
            rest[index] = "*"
    return ".".join(rest)


def bias_of(info: TensorInfo, axes: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor with one element per neuron that is added to their outputs."""
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


def matching(globs: Iterable[str], names: Collection[str], *, option: str | None = None) -> set[str]:
    """The ``names`` that any of ``globs`` matches; each must match some if an ``option`` is named."""
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        if _MAGIC.search(glob) is None:
            matched = {glob} if glob in names else set()
        else:
            match = re.compile(fnmatch.translate(glob)).match
            matched = {name for name in names if match(name)}
        if option is not None and not matched:
            raise UsageError(
                f"no tensor matches [[{option}]] {glob!r}",
                hint="patterns match whole tensor names: try '*' at the start, and see `neftsurgery inspect`",
            )
        found |= matched
    return found
