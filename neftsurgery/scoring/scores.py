"""The scores file: one number per neuron, and from the same pass the sums all scores derive from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.provenance import Provenance
from ..errors import UsageError, boundary
from ..neurons.anatomy import NeuronTensor
from ..options import SelectOptions, split
from ..selection.budget import Budget
from ..selection.choice import Block, choose
from ..selection.selection import Chosen, Selection
from ..tensors.arrays import Float32Array, Int64Array
from ..tensors.document import Fact, Facts, as_number, bad, read_document
from ..tensors.reader import FileBacked, TensorFile
from ..text import lines, plural, printable, size
from .scored_tensors import (
    WHAT,
    ScoreArrays,
    SumBatch,
    Unscored,
    batches,
    read_all_scored,
    read_companion_biases,
)

SCORES_KEY = "neuron_scores"
SCORES_VERSION = 2
_MAX_ELEMENTS = 1 << 62  # of all tensors together, so that no sum of them leaves int64


def _stated(value: object) -> str:
    return "unknown" if value is None else str(value)


class Scores(FileBacked):
    """An open scores file: what was scored is in memory, the numbers are read when asked for."""

    score = Fact(_stated, "facts")  # which score
    anatomy = Fact(_stated, "facts")  # which anatomy: ``rows``, ``ffn`` or ``units``
    base = Fact(Provenance.from_json, "facts")  # the base, as far as it is known
    tuned = Fact(Provenance.from_json, "facts")  # the fine-tuned checkpoint, as far as it is known
    nonfinite = Fact(lambda count: int(as_number(count) or 0), "facts")  # neurons that hold a NaN or Inf
    #: Which sides, ``base`` or ``tuned``, store scored weights as codes.
    quantized = Fact(lambda sides: frozenset({"base", "tuned"} & Facts.from_json(sides).keys()), "facts")

    def __init__(self, file: TensorFile) -> None:
        """Of an open file, which the new object takes over; raises as `load`."""
        super().__init__(file)
        facts = read_document(file, SCORES_KEY, WHAT, SCORES_VERSION)
        if facts["version"] > 1:  # tens of thousands of tensors share a few descriptions
            try:
                known = dict(enumerate(facts.pop("descriptions")))
                facts["tensors"] = {name: known[number] for name, number in facts["tensors"].items()}
            except (KeyError, TypeError) as error:
                raise bad(file, WHAT, "a tensor has no description") from error
        self.facts = Facts(facts)  # the file's JSON document
        self.tensors = read_all_scored(file, facts["tensors"])  # ordered by name
        #: Those of one-element neurons whose changes are recorded.
        self.companion_biases = read_companion_biases(file, facts, self.tensors)
        for which, least in (("parameters", 1), ("nonfinite", 0)):
            count = facts.get(which, least)
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise bad(file, WHAT, f"{which} is not a count")
        if sum(tensor.info.elements for tensor in self.tensors.values()) >= _MAX_ELEMENTS:
            raise bad(file, WHAT, "there are more elements than a model can have")
        self._arrays = ScoreArrays.checked(file, facts, self.tensors, self.companion_biases)

    @classmethod
    @boundary
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Open a scores file. A vector per tensor and ``tensors`` suffice, so it may be made by others.

        A `CorruptFileError` says that it is not a scores file, or damaged.
        """
        return cls(TensorFile.named(path, SCORES_KEY))

    def __repr__(self) -> str:
        return printable(f"<Scores {self.path or 'not saved'}: {self.score} of {self.neurons:,} neurons>")

    def __str__(self) -> str:
        units = f" in {plural(self.units, 'unit')}" if self.by_unit else ""
        base, tuned = self.base.name, self.tuned.name
        return lines(
            [
                f"scores {self.path or '(not saved)'}, {size(self.nbytes)}",
                f"  {self.score} of {plural(self.neurons, 'neuron')} of {plural(len(self.tensors), 'tensor')}"
                f"{units} (anatomy {self.anatomy})",
                *([f"  base {base}, tuned {tuned}"] if base and tuned else []),
            ]
        )

    def values(self, name: str) -> Float32Array:
        """The scores of tensor ``name``, float32 ``[n]``; NaN for neurons that cannot be chosen."""
        return self._arrays.read("score", [self.tensors[name]])

    def sums(self, name: str, which: str) -> NDArray[Any] | None:
        """``base_sq``, ``delta_sq``, ``dot``, ``changed`` or ``unit`` of a tensor, ``[n]``, or None."""
        tensor = self.tensors.get(name) or self.companion_biases.get(name)
        return self._arrays.read(which, [tensor]) if tensor and self._arrays.has(name, which) else None

    def have(self, which: str) -> bool:
        """Whether every scored tensor has these sums."""
        return len(self._arrays.having(self.tensors.values(), which)) == len(self.tensors)

    def batches(self, *which: str) -> Iterator[SumBatch]:
        """The named sums of all tensors that have them, many tensors at a time."""
        return batches(self._arrays, self.tensors.values(), which)

    @cached_property
    def unscored(self) -> Mapping[str, Unscored]:
        """The common tensors that were not scored, by name."""
        found = Facts.from_json(self.facts.get("unscored"))
        return {name: Unscored.from_json(entry) for name, entry in found.items()}

    @cached_property
    def by_unit(self) -> bool:
        """Whether neurons are chosen by whole units."""
        return bool(self._arrays.having(self.tensors.values(), "unit"))

    @cached_property
    def units(self) -> int:
        """How many units the neurons form; 0 where they are scored one by one."""
        if not self.by_unit:
            return 0
        return 1 + max(int(self._unit_ids(name).max(initial=-1)) for name in self.tensors)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model; of the scored tensors where the file does not say."""
        found = self.facts.get("parameters")
        return found if isinstance(found, int) else sum(t.info.elements for t in self.tensors.values())

    @cached_property
    def neurons(self) -> int:
        """How many neurons the scored tensors have, without those that the anatomy does not count."""
        return sum(tensor.neurons for tensor in self.tensors.values())

    @boundary
    def select(self, **budget: Unpack[SelectOptions]) -> Selection:
        """Choose neurons.

        Args:
            **budget: As `Budget.of`: one of ``neurons``, ``params``, ``threshold``, ``changed``, ``like`` (a
                selection, or counts per tensor); and ``per``, ``max_per_tensor``, ``policy``, ``seed``,
                ``with_bias``.

        Raises:
            UsageError: For options that make no sense, or do not go together.
            MismatchError: If no neuron can be chosen.
        """
        split("select", budget, SelectOptions)
        return self.choose(Budget.of(**budget))

    def choose(self, budget: Budget) -> Selection:
        """As `select`, for a budget that is already checked."""
        if self.by_unit:
            budget.check_units()
        if budget.changed:
            chosen = dict(self._changed())
        elif self.by_unit:
            chosen = dict(self._choose_units(budget))
        else:
            chosen = dict(self._choose_neurons(budget))
        companion_biases = self._bias_elements(chosen, budget) if budget.with_bias else {}
        self.check_unchanged()
        tensors: dict[str, Chosen] = {}
        for name, index in sorted((chosen | companion_biases).items()):
            if len(index):
                home = self.tensors.get(name) or self.companion_biases[name]
                tensors[name] = Chosen(home.info, home.layout, index.astype(np.int64, copy=False))
        facts = self._facts(budget, tensors)
        if companion_biases:
            facts["followers"] = sorted(set(companion_biases) & set(tensors))
        return Selection(tensors, facts)

    def _choose_neurons(self, budget: Budget) -> Iterator[tuple[str, Int64Array]]:
        def alike(tensor: NeuronTensor) -> tuple[str, str, int]:
            """The same for neighbours that may share a block: one pool, and one cost per neuron."""
            own = budget.per == "tensor" or budget.like is not None or budget.max_per_tensor is not None
            return (
                tensor.info.name if own else "",
                tensor.layer if budget.per == "layer" else "",
                tensor.layout.width if budget.params is not None else 1,
            )

        groups = [(key, list(members)) for key, members in groupby(self.tensors.values(), key=alike)]
        blocks = [Block(*key, self._arrays.scores(members)) for key, members in groups]
        masks = choose(blocks, budget, parameters=self.parameters)
        for (_, members), mask in zip(groups, masks, strict=True):
            taken, edges = np.flatnonzero(mask), np.cumsum([0, *(tensor.layout.count for tensor in members)])
            cuts = pairwise(np.searchsorted(taken, edges).tolist())
            for tensor, start, (low, high) in zip(members, edges.tolist(), cuts, strict=False):
                if low < high:
                    yield tensor.info.name, taken[low:high] - start

    def _choose_units(self, budget: Budget) -> Iterator[tuple[str, Int64Array]]:
        ids = {name: self._unit_ids(name) for name in self.tensors}
        count = 1 + max(int(unit.max(initial=-1)) for unit in ids.values())
        score = np.full(count, np.nan, np.float32)
        cost, layer = np.zeros(count, np.int64), np.zeros(count, np.int32)
        layers = sorted({tensor.layer for tensor in self.tensors.values()})
        seen: list[Int64Array] = []
        for name, tensor in self.tensors.items():
            mine = ids[name] >= 0
            unit = ids[name][mine]
            fresh = unit[cost[unit] == 0]
            seen.append(fresh[np.sort(np.unique(fresh, return_index=True)[1])])
            score[unit] = self.values(name)[mine]
            layer[unit] = layers.index(tensor.layer)
            np.add.at(cost, unit, tensor.layout.width)
        order = np.concatenate(seen)  # units by first member: the order that breaks ties
        edges = np.flatnonzero((np.diff(cost[order]) != 0) | (np.diff(layer[order]) != 0)) + 1
        runs = [run for run in np.split(order, edges) if len(run)]
        blocks = [Block("", layers[layer[run[0]]], int(cost[run[0]]), score[run]) for run in runs]
        taken = np.zeros(count + 1, np.bool_)  # the last one is for neurons of no unit, whose id is -1
        for run, mask in zip(runs, choose(blocks, budget, parameters=self.parameters), strict=True):
            taken[run] = mask
        for name, unit in ids.items():
            yield name, np.flatnonzero(taken[unit])

    def _unit_ids(self, name: str) -> Int64Array:
        ids = self.sums(name, "unit")
        if ids is None:
            raise bad(self._file, WHAT, "some tensors have units, and this one has none", name)
        # The number of units bounds what is allocated for them: no more than there are neurons.
        if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < 1 + self.neurons:
            raise bad(self._file, WHAT, "a unit number is out of range", name)
        return ids

    def _changed(self) -> Iterator[tuple[str, Int64Array]]:
        for name, tensor in self.tensors.items():
            changed = self._differing(name)
            yield name, changed[tensor.counted()[changed]]
        for name, bias in self.companion_biases.items():
            if bias.included:
                yield name, self._differing(name)

    def _differing(self, name: str) -> Int64Array:
        """The neurons of a tensor that have a bit that differs."""
        changed = self.sums(name, "changed")
        if changed is None:
            raise UsageError(
                "[[changed]] needs the number of changed elements, and these scores do not have it",
                file=self._file.path,
                tensor=name,
            )
        return np.flatnonzero(changed)

    def _bias_elements(self, chosen: Mapping[str, Int64Array], budget: Budget) -> dict[str, Int64Array]:
        """The bias elements that go with the chosen neurons; by ``--changed``, all that differ as well."""
        found: dict[str, Int64Array] = {}
        for name, tensor in self.tensors.items():
            bias = tensor.bias
            if bias is None or bias not in self.companion_biases or bias in chosen:
                continue
            index = chosen.get(name, np.empty(0, np.int64))
            if budget.changed:
                index = np.union1d(index, self._differing(bias))
            found[bias] = np.union1d(found[bias], index) if bias in found else index
        return found

    def _facts(self, budget: Budget, tensors: Mapping[str, Chosen]) -> dict[str, object]:
        described = budget.describe()
        if "like" in described:
            described["like"] = "the counts per tensor of another selection"
        facts: dict[str, object] = {"score": self.score, "policy": budget.policy, "budget": described}
        facts["anatomy"] = self.anatomy
        if budget.policy == "random":
            facts["seed"] = budget.seed
        facts |= self.captured(tensors)
        for side in ("base", "tuned"):
            if isinstance(self.facts.get(side), dict):
                facts[side] = self.facts[side]
        return facts

    def captured(self, tensors: Mapping[str, Chosen]) -> dict[str, float]:
        """The share of the whole change that the chosen neurons hold: ``captured``, ``captured_scored``.

        ``captured`` is of all common tensors, ``captured_scored`` of the scored ones. Empty where
        the file has no sums, or nothing changed; without ``captured`` where a tensor changed whose
        change has no size (a quantized one).
        """
        inside = scored = rest = 0.0
        if not self.have("delta_sq"):
            return {}
        chosen = {name: part.index for name, part in tensors.items() if name in self.tensors}
        for batch in self.batches("delta_sq"):
            scored += batch.total("delta_sq")
            rest += 0.0 if batch.uncounted is None else float(batch.uncounted["delta_sq"].sum())
            inside += batch.total("delta_sq", chosen)
        extra = 0.0
        for name in self.companion_biases:
            if name in tensors and (delta := self.sums(name, "delta_sq")) is not None:
                extra += float(np.nansum(delta[tensors[name].index]))
        unscored = self.unscored.values()
        known = all(entry.delta_sq is not None or not entry.changed for entry in unscored)
        whole = scored + rest + sum(entry.delta_sq or 0.0 for entry in unscored)
        result = {}
        if known and math.isfinite(whole) and whole > 0:
            result["captured"] = min(1.0, (inside + extra) / whole)
        if math.isfinite(scored) and scored > 0:
            result["captured_scored"] = min(1.0, inside / scored)
        return result
