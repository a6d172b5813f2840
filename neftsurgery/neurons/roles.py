"""The family table, compiled: the last parts of a name to the role of its tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .families import EMBEDDINGS, FAMILIES, HEADS, Attention, AxisOrder, Family, FeedForward

__all__ = ["Role", "family_of", "roles"]


@dataclass(frozen=True, slots=True)
class Role:
    """What a pattern of the family table says about the tensors it matches.

    Attributes
    ----------
    what:
        ``"embedding"``, ``"output head"`` and ``"router"`` are left out, ``"weight"`` counts.
    order:
        The order of the axes.
    block, member:
        The block that the tensor is part of, and its field in the block; None and ``""`` if there is none.
    depth:
        How many parts the pattern has.
    container:
        How many leading parts all patterns of the block share: tensors that agree in these, and in
        everything before the pattern, form one block.
    """

    what: Literal["embedding", "output head", "router", "weight"]
    order: AxisOrder
    block: FeedForward | Attention | None
    member: str
    depth: int
    container: int


@functools.cache
def family_of(model_type: str) -> Family | None:
    """The family that serves ``model_type``, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types.split()), None)


@functools.cache
def roles(family: Family) -> dict[tuple[str, ...], Role]:
    """All patterns of ``family``, split at the dots, with what they say."""
    found: dict[tuple[str, ...], Role] = {}
    plain: tuple[tuple[Literal["embedding", "output head", "router"], tuple[str, ...]], ...] = (
        ("embedding", EMBEDDINGS + family.embeddings),
        ("output head", HEADS + family.heads),
        ("router", family.routers),
    )
    for what, patterns in plain:
        for pattern in patterns:
            parts = tuple(pattern.split("."))
            found[parts] = Role(what, "out in", None, "", len(parts), 0)
    for pattern in family.transposed:
        parts = tuple(pattern.split("."))
        found[parts] = Role("weight", "in out", None, "", len(parts), 0)
    blocks: tuple[FeedForward | Attention, ...] = (*family.feed_forward, *family.attention)
    for block in blocks:
        members = {member: tuple(pattern.split(".")) for member, pattern in _members(block)}
        shared = _common(list(members.values()))
        for member, parts in members.items():
            found[parts] = Role("weight", block.order, block, member, len(parts), shared)
    return found


def _members(block: FeedForward | Attention) -> Iterator[tuple[str, str]]:
    names = (
        ("up", "gate", "down", "gate_up") if isinstance(block, FeedForward) else ("q", "k", "v", "o", "qkv")
    )
    for name in names:
        pattern: str = getattr(block, name)
        if pattern:
            yield name, pattern


def _common(paths: list[tuple[str, ...]]) -> int:
    """How many leading parts all ``paths`` share, their last parts not counted."""
    count = 0
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count
