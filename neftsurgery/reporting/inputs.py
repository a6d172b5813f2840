"""The inputs of a report: scores files, each with what a budget chooses, and patches of both kinds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import MismatchError, UsageError
from ..patch.lossless import LosslessPatch, load_any
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_KEY
from ..scoring.scores import SCORES_KEY, Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..tensors.arrays import Float32Array, Float64Array, Int64Array, Mask
from ..tensors.header import read_header
from .layer_map import LayerMap, locate_tensors

_DIFF_HINT = "make scores first: `neftsurgery diff BASE TUNED -o scores.safetensors`"


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a budget chooses from, neurons or units (at their first neuron), in the order of ties."""

    score_name: str
    word: str  # ``neuron`` or ``unit``
    tensors: tuple[str, ...]  # the names of all scored tensors
    # Each array is ``[n]``. For a unit, they are of its first neuron, and the squared norms are sums.
    tensor: Int64Array  # the number of the tensor
    index: Int64Array  # of the neuron in it
    score: Float32Array
    base_sq: Float64Array | None  # the squared norm of the base vector; None if the file does not hold them
    delta_sq: Float64Array | None  # that of the change
    chosen: Mask  # whether the budget chooses it
    kinds: tuple[str, ...]  # the names of the kinds of weight; for units, those of the blocks
    kind: Int64Array  # the number of the kind

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def order(self) -> Int64Array:
        """The candidates, the most sensitive first."""
        return np.argsort(-self.score, kind="stable")


@dataclass(frozen=True, eq=False)
class ScoresInput:
    """A scores file, and what a budget chooses from it."""

    name: str
    scores: Scores
    budget: Budget
    selection: Selection

    @property
    def word(self) -> str:
        """The word for the neurons of its layer map."""
        return "sensitive" if self.budget.policy == "sensitive" else "chosen"

    @cached_property
    def map(self) -> LayerMap:
        """The layer map of the chosen neurons."""
        return LayerMap.of_scores(self.scores, self.selection)


@dataclass(frozen=True, eq=False)
class PatchInput:
    """A patch."""

    name: str
    patch: Patch
    word: ClassVar[str] = "replaced"  # for the neurons of its layer map

    @cached_property
    def map(self) -> LayerMap:
        """The layer map of the replaced neurons."""
        return LayerMap.of_patch(self.patch)


@dataclass(frozen=True, eq=False)
class LosslessInput:
    """A lossless patch, which chooses no neurons."""

    name: str
    patch: LosslessPatch


ReportInput = ScoresInput | PatchInput | LosslessInput


def open_inputs(paths: Sequence[str | os.PathLike[str]], budget: Budget) -> list[ReportInput]:
    """Open the inputs of a report, and choose neurons from each scores file."""
    if not paths:
        raise UsageError("there is nothing to report on", hint="name scores files or patches")
    found: list[ReportInput] = []
    for path, name in zip(paths, _names([Path(path) for path in paths]), strict=True):
        if not Path(path).is_file():
            folder = "expected a scores file or a patch, found a folder"
            what = folder if Path(path).is_dir() else "there is no such file"
            raise UsageError(what, file=path, hint=_DIFF_HINT)
        metadata = read_header(Path(path)).metadata
        if SCORES_KEY in metadata:
            scores = Scores.load(path)
            selection = scores.choose(budget)
            if not selection.tensors:
                hint = "the threshold may be too high"
                raise MismatchError("no neuron is chosen", file=scores.path, hint=hint)
            found.append(ScoresInput(name, scores, budget, selection))
        elif PATCH_KEY in metadata:
            patch = load_any(path)
            found.append(PatchInput(name, patch) if isinstance(patch, Patch) else LosslessInput(name, patch))
        else:
            raise UsageError("this is neither a scores file nor a patch", file=path, hint=_DIFF_HINT)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """A unique name for each path: the file's name, if necessary with its folder's name and a number."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}/{path.name}" for path in paths]
    earlier = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, earlier, strict=True)]


def read_candidates(scores: Scores, selection: Selection) -> Candidates:
    """Read the candidates into memory: about 40 bytes per neuron."""
    tensors = tuple(scores.tensors)
    counts = [tensor.layout.count for tensor in scores.tensors.values()]
    tensor = np.repeat(np.arange(len(tensors)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    score = np.concatenate([scores.values(name) for name in tensors])
    sums = [_joined(scores, which) for which in ("base_sq", "delta_sq")]
    chosen = np.zeros(len(score), np.bool_)
    for name, mask in zip(tensors, np.split(chosen, np.cumsum(counts)[:-1]), strict=True):
        if name in selection.tensors:
            mask[selection.tensors[name].index] = True
    locations = locate_tensors(tensors)
    tensor_kinds = [locations[name].kind for name in tensors]
    keep = np.flatnonzero(score == score)  # not NaN
    if scores.by_unit:
        tensor_kinds = [name.rpartition(".")[0] or name for name in tensor_kinds]
        unit = np.concatenate([_units(scores, name) for name in tensors])
        keep = keep[unit[keep] >= 0]
        keep = keep[np.sort(np.unique(unit[keep], return_index=True)[1])]
        group = np.unique(unit, return_inverse=True)[1]
        sums = [None if s is None else np.bincount(group, s)[group].astype(np.float64) for s in sums]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(tensor_kinds))}
    kind = np.array([numbers[name] for name in tensor_kinds])
    base_sq, delta_sq = (None if values is None else values[keep] for values in sums)
    return Candidates(
        scores.score,
        "unit" if scores.by_unit else "neuron",
        tensors,
        tensor[keep],
        index[keep],
        score[keep],
        base_sq,
        delta_sq,
        chosen[keep],
        tuple(numbers),
        kind[tensor[keep]],
    )


def _joined(scores: Scores, which: str) -> Float64Array | None:
    """One of the sums for all neurons, NaN as 0; None unless every tensor has it."""
    parts = [part for name in scores.tensors if (part := scores.sums(name, which)) is not None]
    return np.nan_to_num(np.concatenate(parts)) if len(parts) == len(scores.tensors) else None


def _units(scores: Scores, name: str) -> Int64Array:
    ids = scores.sums(name, "unit")
    return np.full(scores.tensors[name].layout.count, -1) if ids is None else ids
