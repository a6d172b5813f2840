"""Where a patch's neurons lie: how many in which layer, and of which kind of weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..anatomy.meaning import place
from ..patch.patch import Patch
from ..selection.selection import followers_of

__all__ = ["Places", "places_of"]

#: More of either make no table that a person reads: neighbours are put together, rare kinds too.
_MOST_LAYERS = 40
_MOST_KINDS = 8


@dataclass(frozen=True)
class Places:
    """A patch's neurons by layer and kind; bias elements that follow a neuron are left out.

    Attributes
    ----------
    kinds:
        Kinds of weight, those with most neurons first; ``None`` stands for all further ones.
    layers:
        Names of layers in the model's order, ``"model.layers.3"``; ``""`` for what is in none. One name,
        or the first and last of neighbours that were put together.
    counts:
        Neurons per layer and kind.
    """

    kinds: Sequence[str | None]
    layers: Sequence[tuple[str, str]]
    counts: Sequence[Sequence[int]]

    @property
    def totals(self) -> list[int]:
        """Neurons per layer."""
        return [sum(row) for row in self.counts]


def places_of(patch: Patch) -> Places:
    """Count a patch's neurons. Layers and kinds are told from the tensors' names alone."""
    followers = followers_of(patch.facts)
    counts: dict[str, dict[str, int]] = {}
    for name, tensor in patch.tensors.items():
        if name not in followers and tensor.count:
            layer, kind = place(name.split("."))
            row = counts.setdefault(layer, {})
            row[kind] = row.get(kind, 0) + tensor.count
    kinds = _kinds(counts)
    rows = [(layer, [_count(counts[layer], kind, kinds) for kind in kinds]) for layer in _ordered(counts)]
    groups = list(_together(rows))
    return Places(kinds, [(first, last) for first, last, _ in groups], [row for *_, row in groups])


def _kinds(counts: Mapping[str, Mapping[str, int]]) -> list[str | None]:
    totals: dict[str, int] = {}
    for row in counts.values():
        for kind, count in row.items():
            totals[kind] = totals.get(kind, 0) + count
    ordered = sorted(totals, key=lambda kind: (-totals[kind], kind))
    if len(ordered) <= _MOST_KINDS:
        return list(ordered)
    return [*ordered[: _MOST_KINDS - 1], None]


def _count(row: Mapping[str, int], kind: str | None, kinds: Sequence[str | None]) -> int:
    if kind is not None:
        return row.get(kind, 0)
    return sum(count for name, count in row.items() if name not in kinds)


def _ordered(layers: Mapping[str, object]) -> list[str]:
    """Layers by number within their stack; what is in no layer comes last."""

    def key(layer: str) -> tuple[bool, str, int]:
        stack, _, number = layer.rpartition(".")
        return not layer, stack, int(number) if number.isdecimal() and len(number) < 10 else 0

    return sorted(layers, key=key)


def _together(rows: Sequence[tuple[str, list[int]]]) -> Iterator[tuple[str, str, list[int]]]:
    """Neighbours of one stack as one row, so many that no more than `_MOST_LAYERS` or so are left."""
    size = -(-len(rows) // _MOST_LAYERS)
    start = 0
    while start < len(rows):
        stack = rows[start][0].rpartition(".")[0]
        stop = start + 1
        while stop < min(start + size, len(rows)) and rows[stop][0].rpartition(".")[0] == stack:
            stop += 1
        columns = zip(*(row for _, row in rows[start:stop]), strict=True)
        yield rows[start][0], rows[stop - 1][0], [sum(column) for column in columns]
        start = stop
