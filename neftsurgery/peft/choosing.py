"""Which neurons of a live model an adapter trains: by a file, or by a budget over the whole model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checkpoint.in_memory import tensor_info
from ..errors import MismatchError, UsageError
from ..live.placement import live_places
from ..live.weights import from_bytes, is_plain
from ..neurons.anatomy import NeuronTensor, read_anatomy
from ..neurons.layout import Layout
from ..patch.patch import Patch
from ..selection.budget import Amount, Budget
from ..selection.choice import Block, choose
from ..selection.selection import SELECTION_KEY, Selection
from ..tensors.header import TensorInfo, read_header
from .config import DatalessPolicy, NeftConfig


@dataclass(frozen=True)
class ChosenNeurons:
    """The neurons of one parameter that an adapter trains."""

    layout: Layout
    index: NDArray[np.int64]  # ascending, ``[k]``
    values: Tensor | None = None  # ``[k, width]``; None: those of the base


def chosen_neurons(
    model: nn.Module, parameters: Mapping[str, Tensor], config: NeftConfig
) -> dict[str, ChosenNeurons]:
    """The neurons by parameter name; ``parameters``: those that may have some.

    Raises a `UsageError` unless the config names either a file or a budget, and a `MismatchError` if the file
    does not fit the model.
    """
    budget = config.neurons is not None or config.params is not None
    if bool(config.selection) == budget:
        raise UsageError(
            "a config names a selection or patch file, or a budget",
            found="both" if budget else "neither",
            hint='give NeftConfig one of selection="selection.safetensors" and neurons="3%"',
        )
    if config.selection:
        return _of_file(model, config.selection)
    return _of_budget(model, parameters, config)


def _of_file(model: nn.Module, path: str) -> dict[str, ChosenNeurons]:
    is_selection = Path(path).is_file() and SELECTION_KEY in read_header(path).metadata
    return neurons_of(model, Selection.load(path) if is_selection else Patch.load(path))


def neurons_of(model: nn.Module, what: Selection | Patch) -> dict[str, ChosenNeurons]:
    """The neurons of a selection or patch by parameter, which may hold several tensors of the files."""
    tensors = (what.selection if isinstance(what, Patch) else what).tensors
    places = live_places(model, {name: chosen.layout for name, chosen in tensors.items()})
    parts: dict[str, list[tuple[Layout, NDArray[np.int64], Tensor | None]]] = {}
    for name, chosen in tensors.items():
        values = from_bytes(what.values(name), chosen.info.dtype) if isinstance(what, Patch) else None
        for place in places[name]:
            index = place.index_of(chosen.index)
            here = index >= 0
            held = None if values is None else values[torch.from_numpy(here)]
            parts.setdefault(place.parameter, []).append((place.layout, index[here], held))
    return {parameter: _joined(parameter, found) for parameter, found in parts.items()}


def _joined(
    parameter: str, parts: Sequence[tuple[Layout, NDArray[np.int64], Tensor | None]]
) -> ChosenNeurons:
    """The neurons of a parameter, which may hold several tensors of the files."""
    layout = parts[0][0]
    if any(other != layout for other, _, _ in parts):
        raise UsageError("the file has neurons along two axes of one weight", tensor=parameter)
    index = np.concatenate([index for _, index, _ in parts])
    order = np.argsort(index, kind="stable")
    values = [held for _, _, held in parts if held is not None]
    return ChosenNeurons(layout, index[order], torch.cat(values)[torch.from_numpy(order)] if values else None)


def _of_budget(
    model: nn.Module, parameters: Mapping[str, Tensor], config: NeftConfig
) -> dict[str, ChosenNeurons]:
    budget = Budget(
        neurons=None if config.neurons is None else Amount.parse(config.neurons),
        params=None if config.params is None else Amount.parse(config.params),
        policy="random" if config.policy == "random" else "sensitive",
        seed=config.seed,
    )
    own: Any = getattr(model, "config", None)
    infos = {name: _info(model, name, value) for name, value in parameters.items()}
    anatomy = read_anatomy(
        config.anatomy,
        infos,
        own.to_dict() if hasattr(own, "to_dict") else None,
        axis={name: 0 for name, info in infos.items() if len(info.shape) > 2},  # candidates are convolutions
        include=config.include,
    )
    if not anatomy.scored:
        raise MismatchError(
            "no neuron can be chosen",
            found="no module that target_modules and exclude_modules allow" if not infos else None,
            hint="name modules of the model, or include=[...] tensors that are left out",
        )
    units = _Units.of(anatomy.scored)
    for tensor in anatomy.scored:
        units.add(tensor.info.name, _scores(config.policy, parameters[tensor.info.name], tensor))
    total = sum(info.elements for info in infos.values())
    chosen = np.concatenate(choose(units.blocks(), budget, parameters=total))
    found = {}
    for tensor in anatomy.scored:
        ids = units.ids[tensor.info.name]
        index = np.flatnonzero((ids >= 0) & chosen[np.maximum(ids, 0)])
        if len(index):
            found[tensor.info.name] = ChosenNeurons(tensor.layout, index)
    return found


def _info(model: nn.Module, name: str, value: Tensor) -> TensorInfo:
    if is_plain(value):
        return tensor_info(name, value)
    module: Any = model.get_submodule(name.rpartition(".")[0])  # a quantized linear weight
    return TensorInfo(name, "F32", (module.out_features, module.in_features))


def _scores(policy: DatalessPolicy, weight: Tensor, tensor: NeuronTensor) -> NDArray[np.float64]:
    """What a neuron of ``tensor`` adds to the score of its unit, ``[neurons]``."""
    if policy == "random":
        return np.zeros(tensor.layout.count)
    if not is_plain(weight):
        raise UsageError(
            f"the policy {policy} reads weights, and this one is quantized",
            tensor=tensor.info.name,
            hint='use policy="random", or a selection file',
        )
    others = [axis for axis in range(weight.dim()) if axis not in tensor.axes]
    power = 2 if policy == "norm" else 1
    sums = weight.detach().double().abs().pow(power).sum(others)
    return np.asarray(sums.flatten().cpu().numpy(), np.float64)


@dataclass
class _Units:
    """What is chosen together: the units of the anatomy, or each neuron for itself. Arrays by unit."""

    tensors: list[NeuronTensor]
    ids: dict[str, NDArray[np.int64]]  # the unit of each neuron, by tensor; below zero: none
    home: NDArray[np.int64]  # its first tensor
    scores: NDArray[np.float64]
    costs: NDArray[np.int64]

    @classmethod
    def of(cls, tensors: Iterable[NeuronTensor]) -> _Units:
        every, ids, count = list(tensors), dict[str, NDArray[np.int64]](), 0
        for tensor in every:
            if tensor.units is not None:
                found = tensor.units.ids()
            else:
                found = np.arange(count, count + tensor.layout.count)
                if tensor.part is not None:
                    found = np.where(tensor.part.mask(), found, -1)
            ids[tensor.info.name] = found
            count = max(count, int(found.max(initial=-1)) + 1)
        units = cls(every, ids, np.full(count, -1), np.zeros(count), np.zeros(count, np.int64))
        for number, tensor in enumerate(every):
            mine = ids[tensor.info.name]
            mine = mine[mine >= 0]
            units.home[mine[units.home[mine] < 0]] = number
            np.add.at(units.costs, mine, tensor.layout.width)
        return units

    def add(self, name: str, scores: NDArray[np.float64]) -> None:
        """Add the scores of a tensor's neurons to those of their units."""
        ids = self.ids[name]
        np.add.at(self.scores, ids[ids >= 0], scores[ids >= 0])

    def blocks(self) -> list[Block]:
        """All units, in order, as means over their weights."""
        means = np.full(len(self.home), np.nan)
        np.divide(self.scores, self.costs, out=means, where=self.costs > 0)
        changes = (np.diff(self.home) != 0) | (np.diff(self.costs) != 0)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(self.home)]
        blocks = []
        for start, stop in itertools.pairwise(bounds):
            home, cost = self.tensors[self.home[start]], max(1, int(self.costs[start]))
            blocks.append(Block(home.info.name, home.layer, cost, means[start:stop].astype(np.float32)))
        return blocks
