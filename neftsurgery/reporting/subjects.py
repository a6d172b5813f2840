"""What a report is about: scores files with what a budget chooses of them, and patches."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError, UsageError
from ..patch.patch import PATCH_KEY, Patch
from ..scoring.scores import SCORES_KEY, Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..tensors.header import read_header
from .layer_map import LayerMap, places

__all__ = ["Items", "Patched", "Scored", "Subject", "open_subjects"]

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Items:
    """What a budget chooses from: the neurons that have a score, or the units they form.

    In the order that breaks ties: by tensor name, then index; units by their first neuron.

    Attributes
    ----------
    word:
        ``neuron`` or ``unit``.
    tensors:
        Names of all scored tensors.
    tensor, index:
        Int64 ``[n]``: of each item the number of the tensor and the neuron in it; of a unit, its first.
    score:
        Float32 ``[n]``.
    base_sq, delta_sq:
        Float64 ``[n]``, of a unit the sums over it; None where the file does not have them.
    chosen:
        Bool ``[n]``.
    kinds:
        Names of the kinds of weight; of units, of the blocks they lie in.
    kind:
        Int64 ``[n]``: of each item the number of its kind.
    """

    word: str
    tensors: tuple[str, ...]
    tensor: I64
    index: I64
    score: NDArray[np.float32]
    base_sq: F64 | None
    delta_sq: F64 | None
    chosen: NDArray[np.bool_]
    kinds: tuple[str, ...]
    kind: I64

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def order(self) -> I64:
        """The items, the most sensitive first."""
        return np.argsort(-self.score, kind="stable")


@dataclass(frozen=True, eq=False)
class Scored:
    """A scores file and what a budget chooses of it."""

    name: str
    scores: Scores
    budget: Budget
    selection: Selection

    @property
    def word(self) -> str:
        """What its neurons in the map are."""
        return "sensitive" if self.budget.policy == "sensitive" else "chosen"

    @cached_property
    def map(self) -> LayerMap:
        """Where the chosen neurons are."""
        return LayerMap.of_scores(self.scores, self.selection)

    @cached_property
    def items(self) -> Items:
        """What can be chosen, read into memory: some 40 bytes a neuron."""
        return _items(self.scores, self.selection)


@dataclass(frozen=True, eq=False)
class Patched:
    """A patch."""

    name: str
    patch: Patch

    @property
    def word(self) -> str:
        """What its neurons in the map are."""
        return "replaced"

    @cached_property
    def map(self) -> LayerMap:
        """Where the replaced neurons are."""
        return LayerMap.of_patch(self.patch)

    @cached_property
    def selection(self) -> Selection:
        """Which neurons it replaces."""
        return self.patch.selection


Subject = Scored | Patched


def open_subjects(paths: Sequence[str | os.PathLike[str]], budget: Budget) -> list[Subject]:
    """Open what a report shall be about, and choose from each of the scores.

    Raises
    ------
    UsageError
        If there is nothing of a name, or it is neither scores nor a patch.
    MismatchError
        If the budget chooses nothing of some scores.
    CorruptFileError
        If one is damaged.
    """
    if not paths:
        raise UsageError("there is nothing to report on", hint="name scores files or patches")
    found: list[Subject] = []
    for path, name in zip(paths, _names([Path(path) for path in paths]), strict=True):
        if not Path(path).is_file():
            what = "a folder" if Path(path).is_dir() else "not there"
            raise UsageError(
                f"a report is about scores files and patches, and this is {what}",
                file=path,
                hint="make scores first: neftsurgery diff BASE TUNED -o scores.safetensors",
            )
        metadata = read_header(Path(path)).metadata
        if SCORES_KEY in metadata:
            found.append(_scored(name, Scores.load(path), budget))
        elif PATCH_KEY in metadata:
            found.append(Patched(name, Patch.load(path)))
        else:
            raise UsageError(
                "neither a scores file nor a patch",
                file=path,
                hint="make scores first: neftsurgery diff BASE TUNED -o scores.safetensors",
            )
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each: the file's, with its folder's or a number where that is not enough."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}/{path.name}" for path in paths]
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told


def _scored(name: str, scores: Scores, budget: Budget) -> Scored:
    selection = scores.choose(budget)
    if not selection.tensors:
        raise MismatchError("no neuron is chosen", file=scores.path, hint="the threshold may be too high")
    return Scored(name, scores, budget, selection)


def _items(scores: Scores, selection: Selection) -> Items:
    tensors = tuple(scores.tensors)
    counts = [tensor.layout.count for tensor in scores.tensors.values()]
    tensor = np.repeat(np.arange(len(tensors)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    score = np.concatenate([scores.values(name) for name in tensors])
    base_sq, delta_sq = (_joined(scores, which) for which in ("base_sq", "delta_sq"))
    chosen = np.zeros(len(score), np.bool_)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for number, name in enumerate(tensors):
        if name in selection.tensors:
            chosen[starts[number] + selection.tensors[name].index] = True
    at = places(tensors)
    named = [at[name].kind for name in tensors]
    keep = np.flatnonzero(score == score)  # NaN differs from itself
    if scores.by_unit:
        named = [name.rpartition(".")[0] or name for name in named]
        unit = np.concatenate([_units(scores, name) for name in tensors])
        keep = keep[unit[keep] >= 0]
        keep = keep[np.sort(np.unique(unit[keep], return_index=True)[1])]
        group = np.unique(unit, return_inverse=True)[1]
        base_sq, delta_sq = (
            None if values is None else np.bincount(group, values)[group].astype(np.float64)
            for values in (base_sq, delta_sq)
        )
    kinds = tuple(dict.fromkeys(named))
    numbers = {name: number for number, name in enumerate(kinds)}
    kind = np.array([numbers[name] for name in named])
    return Items(
        "unit" if scores.by_unit else "neuron",
        tensors,
        tensor[keep],
        index[keep],
        score[keep],
        None if base_sq is None else base_sq[keep],
        None if delta_sq is None else delta_sq[keep],
        chosen[keep],
        kinds,
        kind[tensor[keep]],
    )


def _joined(scores: Scores, which: str) -> F64 | None:
    """A sum of all neurons, without NaN; None unless every tensor has it."""
    parts = [scores.sums(name, which) for name in scores.tensors]
    known = [part for part in parts if part is not None]
    return np.nan_to_num(np.concatenate(known)) if len(known) == len(parts) else None


def _units(scores: Scores, name: str) -> I64:
    ids = scores.sums(name, "unit")
    return np.full(scores.tensors[name].layout.count, -1) if ids is None else ids
