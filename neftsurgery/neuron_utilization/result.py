"""The result of ``utilization``, as a value and as a file: the ranks of every neuron, and their summary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, boundary
from ..neurons.layout import Layout, described, described_tensor
from ..selection.budget import Amount
from ..storage.output_checks import refuse_output
from ..tensors.arrays import Float64Array, Int64Array, Mask
from ..tensors.document import bad, dump, read_document, require_entry
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from ..tensors.writer import written_file
from ..text import natural_key

UTILIZATION_KEY = "neuron_utilization"
_VERSION = 1
_WHAT = "utilization file"

GROUPS = ("all", "trained", "untrained", "strongly_affected", "suppressed", "indirectly_affected")
"""The groups of neurons: strongly affected ones moved by more ranks than the limit; suppressed ones of these
fell; indirectly affected ones of these were not trained."""

BUCKET_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 1.0)
"""The bounds of the buckets in figure 2 of the paper: shares of the ranking before training, the largest
correlations first."""

BUCKET_KEYS = ("from", "to", "neurons", "mean_rank_change")

_ENTRIES = (
    ("before", "F64"), ("after", "F64"), ("state_before", "I32"), ("state_after", "I32"),
    ("rank_before", "I64"), ("rank_after", "I64"), ("trained", "U8"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class TensorUtilization:
    """The neurons of one tensor. Each array has the shape ``[n]``."""

    info: TensorInfo
    layout: Layout
    layer: str
    kind: str  # of weight; neurons of one kind are ranked together
    before: Float64Array  # the largest absolute correlation with a hidden state, before training
    after: Float64Array  # and after it
    state_before: NDArray[np.int32]  # the number of that hidden state
    state_after: NDArray[np.int32]
    rank_before: Int64Array  # 1 for the largest correlation of the kind; 0 for a neuron that is not ranked
    rank_after: Int64Array
    trained: Mask  # whether the neuron was trained

    @property
    def change(self) -> Int64Array:
        """How many ranks each neuron rose; negative if it fell."""
        return self.rank_before - self.rank_after

    @property
    def is_ranked(self) -> Mask:
        """Whether each neuron is ranked."""
        return self.rank_before > 0


@dataclass(frozen=True, slots=True)
class NeuronGroup:
    """The summary of a group of neurons."""

    neurons: int
    mean_rank_change: float | None  # the mean of the absolute rank changes; None for an empty group
    mean_share: float | None  # the same as a share of the neurons ranked together, to compare models


class RankBucket(NamedTuple):
    """The neurons between two shares of the ranking before training, the largest correlations first."""

    start: float
    stop: float
    neurons: int
    mean_rank_change: float | None


def with_ranks(tensors: Iterable[TensorUtilization]) -> dict[str, TensorUtilization]:
    """The same neurons with their ranks, kind by kind and ties by name; a NaN is not ranked."""
    kinds: dict[str, list[TensorUtilization]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.info.name):
        kinds.setdefault(tensor.kind, []).append(tensor)
    found = {}
    for pool in kinds.values():
        before, after = (np.concatenate([getattr(t, side) for t in pool]) for side in ("before", "after"))
        unranked = np.isnan(before) | np.isnan(after)
        bounds = np.cumsum([0, *(len(t.before) for t in pool)])
        first, second = (ranks(np.where(unranked, np.nan, side)) for side in (before, after))
        for tensor, start, stop in zip(pool, bounds, bounds[1:], strict=False):
            found[tensor.info.name] = replace(
                tensor, rank_before=first[start:stop], rank_after=second[start:stop]
            )
    return dict(sorted(found.items()))


@dataclass(frozen=True, eq=False, repr=False)
class Utilization:
    """How a fine-tune moved neurons in the ranking by correlation with hidden states.

    The measure of Xu et al., section 6.1 of https://aclanthology.org/2025.coling-main.630/.
    ``docs/utilization.md`` has the definitions.
    """

    tensors: Mapping[str, TensorUtilization]  # by name, ordered by code points
    facts: Mapping[str, Any]  # ``base``, ``tuned`` or ``patch``, ``text``, ``states``, ``strongly``: JSON

    def __repr__(self) -> str:
        groups = self.groups()
        counts = {name: groups[name].neurons for name in ("trained", "strongly_affected")}
        return f"Utilization(neurons={self.neurons}, {', '.join(f'{k}={n}' for k, n in counts.items())})"

    @property
    def neurons(self) -> int:
        """How many neurons are ranked."""
        return sum(self.pools.values())

    @cached_property
    def pools(self) -> dict[str, int]:
        """The number of neurons ranked together, by kind of weight."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.kind] = found.get(tensor.kind, 0) + int(np.count_nonzero(tensor.is_ranked))
        return dict(sorted(found.items()))

    @cached_property
    def limits(self) -> dict[str, int]:
        """The rank change that a strongly affected neuron exceeds, by kind of weight."""
        stated = self.facts.get("strongly")
        amount = None if stated is None else Amount.parse(stated)
        return {kind: rank_limit(amount, pool) for kind, pool in self.pools.items()}

    def masks(self, tensor: TensorUtilization) -> dict[str, Mask]:
        """Which neurons of a tensor are in each of `GROUPS`, bool ``[n]``."""
        is_ranked, change = tensor.is_ranked, tensor.change
        strongly = is_ranked & (np.abs(change) > self.limits[tensor.kind])
        return {
            "all": is_ranked,
            "trained": is_ranked & tensor.trained,
            "untrained": is_ranked & ~tensor.trained,
            "strongly_affected": strongly,
            "suppressed": strongly & (change < 0),
            "indirectly_affected": strongly & ~tensor.trained,
        }

    def groups(self, *, layer: str | None = None, kind: str | None = None) -> dict[str, NeuronGroup]:
        """Each of `GROUPS`, for all neurons or for one layer or one kind of weight."""
        sums = np.zeros((len(GROUPS), 3))  # neurons, ranks they moved by, and these as shares
        for tensor in self.tensors.values():
            if layer in (None, tensor.layer) and kind in (None, tensor.kind):
                change = np.abs(tensor.change)
                for row, mask in zip(sums, self.masks(tensor).values(), strict=True):
                    moved = float(change[mask].sum())
                    row += float(np.count_nonzero(mask)), moved, moved / max(1, self.pools[tensor.kind])
        numbers = zip(GROUPS, sums.tolist(), strict=True)
        return {
            name: NeuronGroup(int(n), _mean(ranks, n), _mean(share, n)) for name, (n, ranks, share) in numbers
        }

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers in the model's order."""
        return tuple(sorted({tensor.layer for tensor in self.tensors.values()}, key=natural_key))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of weight, sorted by name."""
        return tuple(self.pools)

    def buckets(self) -> tuple[RankBucket, ...]:
        """The mean rank change along the ranking before training: figure 2 of the paper."""
        counts, moved = np.zeros((2, len(BUCKET_EDGES) - 1))
        for tensor in self.tensors.values():
            is_ranked = tensor.is_ranked
            share = (tensor.rank_before[is_ranked] - 1) / max(1, self.pools[tensor.kind])
            bucket = np.searchsorted(BUCKET_EDGES, share, side="right") - 1
            counts += np.bincount(bucket, minlength=len(counts))
            moved += np.bincount(bucket, np.abs(tensor.change[is_ranked]), minlength=len(moved))
        bounds = zip(BUCKET_EDGES, BUCKET_EDGES[1:], counts, moved, strict=False)
        return tuple(RankBucket(start, stop, int(n), _mean(total, n)) for start, stop, n, total in bounds)

    def describe(self) -> dict[str, object]:
        """The result as JSON: the facts, and the summary by group, kind, layer and bucket."""
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
            "buckets": [dict(zip(BUCKET_KEYS, bucket, strict=True)) for bucket in self.buckets()],
        }

    @boundary
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the numbers of every neuron to a safetensors file, atomically; raises as `Selection.save`."""
        refuse_output(path, inputs=[], force=force, kind="file")
        entries = [one for name, tensor in self.tensors.items() for one in _entries(name, tensor.layout)]
        tensors = {
            name: {**described(t.info, t.layout.axes), "layer": t.layer, "kind": t.kind}
            for name, t in self.tensors.items()
        }
        metadata = dump(UTILIZATION_KEY, {"version": _VERSION, **self.facts, "tensors": tensors})
        with written_file(entries, metadata, path, force=force) as written:
            for entry in entries:
                name, _, which = entry.name.rpartition(":")
                values = getattr(self.tensors[name], which)
                written.write(entry.name, 0, values.astype(DTYPES[entry.dtype].numpy))
            written.finish(metadata)

    @classmethod
    @boundary
    def load(cls, path: str | os.PathLike[str]) -> Utilization:
        """Read a file written by `save`; a `CorruptFileError` says that it is not one, or damaged."""
        with TensorFile.named(path) as file:
            content = read_document(file, UTILIZATION_KEY, _WHAT, _VERSION)
            found = [_read(file, name, content["tensors"][name]) for name in sorted(content["tensors"])]
            facts = {key: value for key, value in content.items() if key not in ("version", "tensors")}
            result = cls(with_ranks(found), facts)
            try:
                result.limits  # noqa: B018
            except UsageError as error:
                raise bad(file, _WHAT, f"strongly: {error.what}") from error
        return result


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None


def _described(groups: Mapping[str, NeuronGroup]) -> dict[str, Any]:
    return {name: asdict(group) for name, group in groups.items()}


def _entries(name: str, layout: Layout) -> list[TensorInfo]:
    return [TensorInfo(f"{name}:{which}", dtype, (layout.count,)) for which, dtype in _ENTRIES]


def _read(file: TensorFile, name: str, entry: object) -> TensorUtilization:
    info, layout = described_tensor(file, _WHAT, name, entry)
    assert isinstance(entry, dict)  # described_tensor has checked it
    layer, kind = entry.get("layer"), entry.get("kind")
    if not isinstance(layer, str) or not isinstance(kind, str) or not layer.rpartition(".")[2].isdecimal():
        raise bad(file, _WHAT, "the layer or kind is missing", name)
    values: dict[str, NDArray[Any]] = {}
    for one in _entries(name, layout):
        require_entry(file, _WHAT, one)
        values[one.name.rpartition(":")[2]] = file.array(one.name)
    values["trained"] = values["trained"].astype(np.bool_)
    return TensorUtilization(info, layout, layer, kind, **values)


PAPER_LIMIT = Fraction(100_000, 32 * 11_008)
"""The paper's limit of 100,000 ranks as a share of the up rows of Llama-2-7B (32 layers of 11,008)."""


def ranks(values: Float64Array) -> Int64Array:
    """The rank of each value, ``[n]``: 1 for the largest, 0 for NaN. Equal values rank in their order."""
    ranked = np.zeros(len(values), np.int64)
    order = np.argsort(-values, kind="stable")  # NaN last
    order = order[: np.count_nonzero(~np.isnan(values))]
    ranked[order] = np.arange(1, len(order) + 1)
    return ranked


def rank_limit(strongly: Amount | None, pool: int) -> int:
    """The rank change that a strongly affected neuron exceeds, in a pool of ``pool`` neurons."""
    if strongly is not None and strongly.count is not None:
        return strongly.count
    percent = None if strongly is None else strongly.percent
    return int((PAPER_LIMIT if percent is None else percent / 100) * pool)
