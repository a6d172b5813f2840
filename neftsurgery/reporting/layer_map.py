"""Where in a model the chosen neurons lie: layers by kinds of weight, as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..neurons.tensor_names import layer_and_kind
from ..patch.patch import Patch
from ..scoring.scores import Scores
from ..selection.selection import Selection, companion_biases
from ..text import label

__all__ = ["OUTSIDE", "LayerMap", "Place", "natural", "places"]

#: The row of tensors that lie in no layer, of a model that has layers.
OUTSIDE = ""
_REST, _ALL = "others", "all kinds"
_MOST_CELLS = 1 << 22

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a tensor lies: its row and its column of the map."""

    layer: str
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each of a model's tensors, by name.

    Where no name has a number in it, as in small networks, there are no layers to tell apart: then
    the rows are the modules, and the columns the names within one.
    """
    found = {name: Place(*layer_and_kind(name.split("."))) for name in names}
    if any(at.layer for at in found.values()):
        return found
    return {name: Place(*_parted(name)) for name in found}


def _parted(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts ``layers.2`` before ``layers.10``."""
    return tuple(
        (0, int(part), part) if part.isascii() and part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"([0-9]+)", name)
    )


@dataclass(frozen=True, eq=False)
class LayerMap:
    """How many neurons are chosen in each layer and kind of weight.

    Attributes
    ----------
    layers:
        Names of the rows, in natural order; `OUTSIDE`, the last if there, holds what lies in no layer.
    kinds:
        Names of the columns, in natural order; those found in no layer come last.
    chosen, totals:
        Int64 ``[layers, kinds]``: neurons chosen, and neurons there are. No neurons, no tensor.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    chosen: I64
    totals: I64

    @classmethod
    def of_counts(cls, counts: Mapping[str, tuple[int, int]]) -> LayerMap:
        """The map of tensors by name, each with its neurons chosen and its neurons in all."""
        where = places(counts)
        layers = sorted(
            {at.layer for at in where.values()}, key=lambda name: (name == OUTSIDE, natural(name))
        )
        inside = sorted(where.values(), key=lambda at: (at.layer == OUTSIDE, natural(at.kind)))
        kinds = list(dict.fromkeys(at.kind for at in inside))
        if len(layers) * len(kinds) > _MOST_CELLS:  # names of no model: a map would be all empty places
            where = {name: Place(at.layer, _ALL) for name, at in where.items()}
            kinds = [_ALL]
        rows, columns = (dict(zip(names, range(len(names)), strict=True)) for names in (layers, kinds))
        chosen, totals = np.zeros((2, len(layers), len(kinds)), np.int64)
        for name, (taken, there) in counts.items():
            cell = rows[where[name].layer], columns[where[name].kind]
            chosen[cell] += taken
            totals[cell] += there
        return cls(tuple(layers), tuple(kinds), chosen, totals)

    @classmethod
    def of_patch(cls, patch: Patch) -> LayerMap:
        """The map of the neurons a patch replaces; of tensors that it does not touch, it knows nothing.

        Bias elements, which follow their neurons, are not counted.
        """
        followers = companion_biases(patch.facts)
        return cls.of_counts(
            {
                name: (tensor.count, tensor.layout.count)
                for name, tensor in patch.tensors.items()
                if name not in followers
            }
        )

    @classmethod
    def of_scores(cls, scores: Scores, selection: Selection) -> LayerMap:
        """The map of the neurons that a selection takes of the scored ones."""
        taken = selection.counts
        counts = {}
        for name, tensor in scores.tensors.items():
            mask = tensor.belongs()
            there = tensor.layout.count if mask is None else int(np.count_nonzero(mask))
            counts[name] = taken.get(name, 0), there
        return cls.of_counts(counts)

    @property
    def share(self) -> NDArray[np.float64]:
        """Chosen over all, float64 ``[layers, kinds]``; NaN where there are no neurons."""
        with np.errstate(invalid="ignore"):
            return self.chosen / self.totals

    @property
    def neurons(self) -> int:
        """Neurons chosen."""
        return int(self.chosen.sum())

    @property
    def total(self) -> int:
        """Neurons there are."""
        return int(self.totals.sum())

    @cached_property
    def prefix(self) -> str:
        """What the names of all layers begin with, up to a dot; it can be left out of labels."""
        inside = [name.split(".") for name in self.layers if name != OUTSIDE]
        shared = 0
        while inside and all(
            len(parts) > shared + 1 and parts[shared] == inside[0][shared] for parts in inside
        ):
            shared += 1
        return "".join(f"{part}." for part in inside[0][:shared]) if inside else ""

    @property
    def row_labels(self) -> tuple[str, ...]:
        """Short names of the layers, fit to be shown."""
        return tuple(
            "elsewhere" if name == OUTSIDE else label(name.removeprefix(self.prefix), 24)
            for name in self.layers
        )

    @property
    def column_labels(self) -> tuple[str, ...]:
        """Short names of the kinds, fit to be shown."""
        return tuple(label(name, 28) for name in self.kinds)

    def folded(self, layers: int, kinds: int) -> LayerMap:
        """At most so many rows and columns: those with the fewest neurons chosen become one."""
        return self._folded_columns(kinds)._transposed()._folded_columns(layers)._transposed()

    def _folded_columns(self, most: int) -> LayerMap:
        if len(self.kinds) <= most:
            return self
        largest = np.argsort(-self.chosen.sum(axis=0), kind="stable")[: most - 1]
        kept = np.sort(largest)
        rest = np.setdiff1d(np.arange(len(self.kinds)), kept)

        def fold(cells: I64) -> I64:
            return np.column_stack([cells[:, kept], cells[:, rest].sum(axis=1)])

        names = (*(self.kinds[i] for i in kept), f"{len(rest):,} {_REST}")
        return LayerMap(self.layers, names, fold(self.chosen), fold(self.totals))

    def _transposed(self) -> LayerMap:
        return LayerMap(self.kinds, self.layers, self.chosen.T, self.totals.T)

    def rows(self) -> Iterator[tuple[str, str, int, int]]:
        """Every cell that has neurons: layer, kind, chosen, total."""
        for i, layer in enumerate(self.layers):
            for j, kind in enumerate(self.kinds):
                if self.totals[i, j]:
                    yield layer, kind, int(self.chosen[i, j]), int(self.totals[i, j])

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": list(self.layers),
            "kinds": list(self.kinds),
            "chosen": self.chosen.tolist(),
            "totals": self.totals.tolist(),
            "neurons": self.neurons,
            "total": self.total,
        }
