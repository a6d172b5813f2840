"""What the analysis found, as a value and as a file: numbers of every neuron, and their summary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, boundary
from ..neurons.description import described_tensor
from ..neurons.layout import Layout
from ..selection.budget import Amount
from ..storage.output_checks import refuse_output
from ..tensors.document import bad, dump, read_document
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..tensors.writer import written_file
from .ranking import limit_of, ranks

__all__ = ["EDGES", "GROUPS", "Bucket", "Group", "NeuronUse", "Utilization", "ranked"]

UTILIZATION_KEY = "neuron_utilization"
_VERSION = 1
_WHAT = "utilization file"

GROUPS = ("all", "trained", "untrained", "strongly_affected", "suppressed", "indirectly_affected")
"""What neurons are grouped into. The last three are the paper's, and overlap: see `Utilization.groups`."""

EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1.0)
"""The bounds of the buckets of figure 2 of the paper: shares of the ranking before, the strongest first."""

_ENTRIES = (
    ("before", "F64"), ("after", "F64"), ("state_before", "I32"), ("state_after", "I32"),
    ("rank_before", "I64"), ("rank_after", "I64"), ("trained", "U8"),
)  # fmt: skip
_TYPES = {"F64": np.dtype("<f8"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "U8": np.dtype(np.uint8)}


@dataclass(frozen=True, slots=True, eq=False)
class NeuronUse:
    """The neurons of one tensor, ``[n]`` each.

    Attributes
    ----------
    info, layout, layer, kind:
        The tensor and its place. Neurons of one ``kind`` are ranked together.
    before, after:
        Float64: the largest absolute correlation with a hidden state, in the base and after training.
    state_before, state_after:
        Int32: the number of that hidden state.
    rank_before, rank_after:
        Int64, from 1 for the largest correlation of the kind; 0 for neurons that are not ranked.
    trained:
        Bool: whether the patch replaces the neuron.
    """

    info: TensorInfo
    layout: Layout
    layer: str
    kind: str
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    state_before: NDArray[np.int32]
    state_after: NDArray[np.int32]
    rank_before: NDArray[np.int64]
    rank_after: NDArray[np.int64]
    trained: NDArray[np.bool_]

    @property
    def change(self) -> NDArray[np.int64]:
        """How many ranks each neuron rose; negative: fell."""
        return self.rank_before - self.rank_after

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which neurons are ranked."""
        return self.rank_before > 0


@dataclass(frozen=True, slots=True)
class Group:
    """Some neurons together.

    Attributes
    ----------
    neurons:
        How many.
    mean_rank_change:
        The mean number of ranks they moved, up or down; None of no neurons.
    mean_share:
        The same as a share of the neurons that they are ranked among, which compares models of
        different size.
    """

    neurons: int
    mean_rank_change: float | None
    mean_share: float | None

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "neurons": self.neurons,
            "mean_rank_change": self.mean_rank_change,
            "mean_share": self.mean_share,
        }


@dataclass(frozen=True, slots=True)
class Bucket:
    """The neurons between two shares of the ranking before, the strongest first."""

    start: float
    stop: float
    neurons: int
    mean_rank_change: float | None


def ranked(tensors: Iterable[NeuronUse]) -> dict[str, NeuronUse]:
    """The same neurons with their ranks: kind by kind, in the order of tensor names where equal.

    A neuron without a correlation, before or after, is ranked in neither.
    """
    kinds: dict[str, list[NeuronUse]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.info.name):
        kinds.setdefault(tensor.kind, []).append(tensor)
    found = {}
    for pool in kinds.values():
        before, after = (np.concatenate([getattr(t, side) for t in pool]) for side in ("before", "after"))
        neither = np.isnan(before) | np.isnan(after)
        bounds = np.cumsum([0, *(len(t.before) for t in pool)])
        first, second = (ranks(np.where(neither, np.nan, side)) for side in (before, after))
        for tensor, start, stop in zip(pool, bounds, bounds[1:], strict=False):
            found[tensor.info.name] = replace(
                tensor, rank_before=first[start:stop], rank_after=second[start:stop]
            )
    return dict(sorted(found.items()))


@dataclass(frozen=True, eq=False)
class Utilization:
    """How a fine-tune moved neurons in the ranking by correlation with hidden states.

    The measure of Xu et al., section 6.1 of https://aclanthology.org/2025.coling-main.630/;
    ``docs/utilization.md`` has the definitions.

    Attributes
    ----------
    tensors:
        By name, ordered by code points.
    facts:
        What was compared and how: ``base``, ``tuned`` or ``patch``, ``text``, ``states``, ``strongly``; JSON.
    """

    tensors: Mapping[str, NeuronUse]
    facts: Mapping[str, Any]

    @property
    def neurons(self) -> int:
        """How many neurons are ranked."""
        return sum(self.pools.values())

    @cached_property
    def pools(self) -> dict[str, int]:
        """Per kind, how many neurons are ranked together."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.kind] = found.get(tensor.kind, 0) + int(np.count_nonzero(tensor.counted))
        return dict(sorted(found.items()))

    @cached_property
    def limits(self) -> dict[str, int]:
        """Per kind, the number of ranks that a strongly affected neuron moves more than."""
        stated = self.facts.get("strongly")
        amount = None if stated is None else Amount.parse(stated)
        return {kind: limit_of(amount, pool) for kind, pool in self.pools.items()}

    def masks(self, tensor: NeuronUse) -> dict[str, NDArray[np.bool_]]:
        """Per group which neurons of a tensor are in it, bool ``[n]``.

        *Strongly affected* ones moved by more ranks than the limit; *suppressed* ones are those of them
        that fell; *indirectly affected* ones those of them that were not trained.
        """
        counted, change = tensor.counted, tensor.change
        strongly = counted & (np.abs(change) > self.limits[tensor.kind])
        return {
            "all": counted,
            "trained": counted & tensor.trained,
            "untrained": counted & ~tensor.trained,
            "strongly_affected": strongly,
            "suppressed": strongly & (change < 0),
            "indirectly_affected": strongly & ~tensor.trained,
        }

    def groups(self, *, layer: str | None = None, kind: str | None = None) -> dict[str, Group]:
        """Every one of `GROUPS`, of all neurons or of one layer's or one kind's."""
        counts, moved, shares = (dict.fromkeys(GROUPS, 0.0) for _ in range(3))
        for tensor in self.tensors.values():
            if layer not in (None, tensor.layer) or kind not in (None, tensor.kind):
                continue
            change = np.abs(tensor.change)
            for name, mask in self.masks(tensor).items():
                total = float(change[mask].sum())
                counts[name] += np.count_nonzero(mask)
                moved[name] += total
                shares[name] += total / self.pools[tensor.kind] if total else 0.0
        return {
            name: Group(
                int(counts[name]), _mean(moved[name], counts[name]), _mean(shares[name], counts[name])
            )
            for name in GROUPS
        }

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the model's order."""
        found = {tensor.layer for tensor in self.tensors.values()}
        return tuple(sorted(found, key=lambda layer: (int(layer.rpartition(".")[2]), layer)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of weights, by name."""
        return tuple(self.pools)

    def buckets(self) -> tuple[Bucket, ...]:
        """The mean rank change along the ranking before: figure 2 of the paper."""
        counts, moved = np.zeros((2, len(EDGES) - 1))
        for tensor in self.tensors.values():
            counted = tensor.counted
            place = (tensor.rank_before[counted] - 1) / max(1, self.pools[tensor.kind])
            bucket = np.searchsorted(EDGES, place, side="right") - 1
            counts += np.bincount(bucket, minlength=len(counts))
            moved += np.bincount(bucket, np.abs(tensor.change[counted]), minlength=len(moved))
        bounds = zip(EDGES, EDGES[1:], counts, moved, strict=False)
        return tuple(Bucket(start, stop, int(n), _mean(total, n)) for start, stop, n, total in bounds)

    def describe(self) -> dict[str, Any]:
        """For JSON: the facts, and the summary by group, kind, layer and bucket."""
        return {
            **self.facts,
            "neurons": self.neurons,
            "pools": self.pools,
            "limits": self.limits,
            "groups": _described(self.groups()),
            "kinds": {kind: _described(self.groups(kind=kind)) for kind in self.kinds},
            "layers": {
                layer: _described(self.groups(layer=layer))
                | {"kinds": {k: _described(self.groups(layer=layer, kind=k)) for k in self.kinds}}
                for layer in self.layers
            },
            "buckets": [
                {"from": b.start, "to": b.stop, "neurons": b.neurons, "mean_rank_change": b.mean_rank_change}
                for b in self.buckets()
            ],
        }

    @boundary
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write every neuron's numbers to a safetensors file, whole or not at all.

        Raises
        ------
        UsageError
            If ``path`` exists, without ``force``.
        MachineError
            If it cannot be written.
        """
        refuse_output(path, inputs=[], force=force, kind="file")
        entries = [
            TensorInfo(f"{name}:{entry}", dtype, (tensor.layout.count,))
            for name, tensor in self.tensors.items()
            for entry, dtype in _ENTRIES
        ]
        described = {
            name: {
                "shape": list(t.info.shape),
                "dtype": t.info.dtype,
                "neuron_axes": list(t.layout.axes),
                "layer": t.layer,
                "kind": t.kind,
            }
            for name, t in self.tensors.items()
        }
        metadata = dump(UTILIZATION_KEY, {"version": _VERSION, **self.facts, "tensors": described})
        with written_file(entries, metadata, path, force=force) as written:
            for name, tensor in self.tensors.items():
                for entry, dtype in _ENTRIES:
                    values = getattr(tensor, entry).astype(_TYPES[dtype])
                    written.writer.write(f"{name}:{entry}", 0, values)
            written.writer.finish(metadata)

    @classmethod
    @boundary
    def load(cls, path: str | os.PathLike[str]) -> Utilization:
        """Read a file that `save` wrote.

        Raises
        ------
        CorruptFileError
            If it is none, or damaged.
        """
        with TensorFile.named(path) as file:
            content = read_document(file, UTILIZATION_KEY, _WHAT, _VERSION)
            found = [_read(file, name, content["tensors"][name]) for name in sorted(content["tensors"])]
            facts = {key: value for key, value in content.items() if key not in ("version", "tensors")}
            result = cls(ranked(found), facts)
            try:
                result.limits  # noqa: B018
            except UsageError as error:
                raise bad(file, _WHAT, f"strongly: {error.what}") from error
        return result


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None


def _described(groups: Mapping[str, Group]) -> dict[str, Any]:
    return {name: group.describe() for name, group in groups.items()}


def _read(file: TensorFile, name: str, entry: object) -> NeuronUse:
    info, layout = described_tensor(file, _WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    layer, kind = entry.get("layer"), entry.get("kind")
    if not isinstance(layer, str) or not isinstance(kind, str) or not layer.rpartition(".")[2].isdecimal():
        raise bad(file, _WHAT, "its layer or kind is missing", name)
    values = dict(_vectors(file, name, layout.count))
    return NeuronUse(info, layout, layer, kind, **values)


def _vectors(file: TensorFile, name: str, count: int) -> Iterator[tuple[str, NDArray[Any]]]:
    for which, dtype in _ENTRIES:
        found = file.tensors.get(f"{name}:{which}")
        if found is None or (found.dtype, found.shape) != (dtype, (count,)):
            raise bad(file, _WHAT, f"its entry {which} is missing or does not fit", name)
        values = file.array(f"{name}:{which}")
        yield which, values.astype(np.bool_) if which == "trained" else values
