"""Neurons of quantized weights as they are cut out: codes and all that they need, in the smallest exact unit.

That is a row, with the rows of scales and zero points that it needs. Where such a row is new and serves other
rows too, they come along: with the old codes it would make other numbers of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.dequantized import stored_side
from ..errors import MismatchError
from ..neurons.layout import Layout
from ..neurons.vectors import gather
from ..patch.groups import RowGroup
from ..quantization.weight import Companion, QuantizedWeight
from ..selection.selection import Chosen, Selection
from ..tensors.arrays import Int64Array, Mask
from ..text import plural


@dataclass(frozen=True)
class StoredRows:
    """A selection of weights, and the same as rows of the tensors that the files hold."""

    selection: Selection  # with the rows that come along
    stored: Selection
    groups: Sequence[RowGroup] = ()
    notes: Sequence[str] = ()  # what came along

    def with_facts(self, more: Mapping[str, object]) -> StoredRows:
        """The same, with more known of how they were chosen."""
        one, other = (Selection(s.tensors, {**s.facts, **more}) for s in (self.selection, self.stored))
        return StoredRows(one, other, self.groups, self.notes)


def stored_rows(selection: Selection, base: Checkpoint, tuned: Checkpoint) -> StoredRows:
    """What a patch of a selection holds; reads those scales that several rows share.

    Raises a `MismatchError` if neurons across the rows of a weight are chosen.
    """
    weights, stored, groups = dict[str, Chosen](), dict[str, Chosen](), list[RowGroup]()
    added = 0
    for name, chosen in selection.tensors.items():
        weight = base.quantized.get(name)
        if weight is None:
            weights[name] = stored[name] = chosen
            continue
        index, parts = _with_shared_rows(weight, _rows_of(chosen, weight, base), base, tuned)
        added += len(index) - len(chosen.index)
        weights[name] = Chosen(chosen.info, chosen.layout, index)
        companions = weight.companions
        for role, rows in parts.items():
            info = companions[role].info
            stored[info.name] = Chosen(info, Layout.of(info.shape, companions[role].axes), rows)
        names = {role: one.info.name for role, one in companions.items()}
        shares = {role: one.span for role, one in companions.items() if role != "codes"}
        groups.append(RowGroup(weight.layout, names, shares))
    if not groups:
        return StoredRows(selection, selection)
    notes = [
        f"{plural(added, 'more neuron')} of quantized weights came along: they share scales that changed "
        "with chosen ones"
    ]
    members = {name for group in groups for name in group.companions.values()}
    followers = sorted(selection.facts.companion_biases | members)
    return StoredRows(
        Selection(weights, selection.facts),
        Selection(dict(sorted(stored.items())), {**selection.facts, "followers": followers}),
        groups,
        notes if added else [],
    )


def _rows_of(chosen: Chosen, weight: QuantizedWeight, base: Checkpoint) -> Int64Array:
    """The chosen neurons as rows of codes."""
    if chosen.layout.axes != weight.row_axes:
        raise MismatchError(
            "neurons across the rows of a quantized weight cannot be cut out: they share its scales",
            file=base.name,
            tensor=chosen.info.name,
            expected=f"neuron axes {list(weight.row_axes)}",
            found=list(chosen.layout.axes),
            hint="choose neurons of [[anatomy=rows]], or keep the whole fine-tune with [[lossless=True]]",
        )
    return chosen.index


def _with_shared_rows(
    weight: QuantizedWeight, rows: Int64Array, base: Checkpoint, tuned: Checkpoint
) -> tuple[Int64Array, Mapping[str, Int64Array]]:
    """The rows with those that must come along, and by role the rows of each tensor."""
    companions = weight.companions
    count = companions["codes"].count
    every = np.arange(count, dtype=np.int64)
    shared = {role: weight.shared_rows(one, every) for role, one in companions.items()}
    wanted = np.zeros(count, np.bool_)
    wanted[rows] = True
    before = 0
    while before < (before := int(wanted.sum())):
        for role, one in companions.items():
            if one.count < count:
                new = _new_rows(one, np.unique(shared[role][wanted]), base, tuned)
                wanted |= np.isin(shared[role], new)
    parts = {role: np.unique(of[wanted]) for role, of in shared.items()}
    return np.flatnonzero(wanted), parts


def _new_rows(one: Companion, rows: Int64Array, base: Checkpoint, tuned: Checkpoint) -> Int64Array:
    """Those of some rows of a companion that differ in the two checkpoints."""
    layout = Layout.of(one.info.shape, one.axes)
    a, b = (gather(stored_side(side), one.info, layout, rows) for side in (base, tuned))
    differ: Mask = (a != b).any(axis=1)
    return np.asarray(rows[differ])
