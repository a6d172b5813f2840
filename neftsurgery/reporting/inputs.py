"""The inputs of a report: scores files, each with what a budget chooses, and patches of both kinds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

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

#: Rows of a table of neurons.
MOST_SHOWN = 20
_DIFF_HINT = "make scores first: `neftsurgery diff BASE TUNED -o scores.safetensors`"


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a budget chooses from, neurons or units (at their first neuron), in the order of ties."""

    score_name: str
    word: str  # ``neuron`` or ``unit``
    tensors: tuple[str, ...]  # the names of all scored tensors
    step: int  # 1; of many, one of so many is here
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

    @property
    def note(self) -> str:
        """For readers: that it is a sample, if it is one."""
        return f" It shows one {self.word} in {self.step}, and the highest." if self.step > 1 else ""

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


def read_candidates(scores: Scores, selection: Selection, *, most: int = 1 << 21) -> Candidates:
    """Read the candidates, about 40 bytes each; of many, those with the highest scores and an even sample."""
    tensors, by_unit = tuple(scores.tensors), scores.by_unit
    step = -(-scores.neurons // most)
    first = scores.choose(Budget.of(neurons=MOST_SHOWN)).tensors if step > 1 else {}
    sums = [which for which in ("base_sq", "delta_sq") if scores.have(which)]
    before, parts = 0, list[Sequence[NDArray[Any]]]()
    for number, (name, home) in enumerate(scores.tensors.items()):
        count = home.layout.count
        unit = scores.sums(name, "unit") if by_unit else None
        places = before + np.arange(count) if unit is None else unit
        chosen, sampled = np.zeros(count, np.bool_), places % step == 0
        for mask, some in ((chosen, selection.tensors), (sampled, first)):
            if name in some:
                mask[some[name].index] = True
        values = scores.values(name)
        mine = np.flatnonzero(sampled & (values == values) & (places >= 0))
        read = [scores.sums(name, which) for which in sums]
        found = [np.nan_to_num(part[mine]) for part in read if part is not None]
        parts.append((np.full(len(mine), number), mine, values[mine], chosen[mine], places[mine], *found))
        before += count
    tensor, index, score, chosen, places, *numbers = map(np.concatenate, zip(*parts, strict=True))
    locations = locate_tensors(tensors)
    tensor_kinds = [locations[name].kind for name in tensors]
    if by_unit:
        tensor_kinds = [name.rpartition(".")[0] or name for name in tensor_kinds]
        keep, group = (np.unique(places, return_index=True, return_inverse=True)[n] for n in (1, 2))
        keep = np.sort(keep)
        tensor, index, score, chosen = (column[keep] for column in (tensor, index, score, chosen))
        numbers = [np.bincount(group, column)[group][keep].astype(np.float64) for column in numbers]
    kinds = {name: number for number, name in enumerate(dict.fromkeys(tensor_kinds))}
    kind = np.array([kinds[name] for name in tensor_kinds])[tensor]
    known = dict(zip(sums, numbers, strict=True))
    word, names = "unit" if by_unit else "neuron", tuple(kinds)
    norms = known.get("base_sq"), known.get("delta_sq")
    return Candidates(scores.score, word, tensors, step, tensor, index, score, *norms, chosen, names, kind)
