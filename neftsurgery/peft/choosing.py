"""Which neurons of a live model an adapter trains: by a file, or by a budget over the whole model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..live.placement import neurons_by_weight
from ..live.weights import from_bytes, is_plain
from ..neurons.anatomy import NeuronTensor, read_anatomy
from ..neurons.layout import Layout
from ..patch.patch import Patch
from ..selection.budget import Amount, Budget
from ..selection.choice import Block, choose
from ..selection.selection import SELECTION_KEY, Selection
from ..tensors.arrays import Float64Array, Int64Array
from ..tensors.header import TensorInfo, read_header
from ..tuning.forwards import forward_of
from .base_vectors import quantization_of, weight_shape
from .config import DatalessPolicy, NeftConfig


@dataclass(frozen=True)
class ChosenNeurons:
    """The neurons of one parameter that an adapter trains."""

    layout: Layout
    index: Int64Array  # ascending, ``[k]``
    values: Tensor | None = None  # ``[k, width]``; None: those of the base
    base: Tensor | None = None  # the vectors of a quantized weight in the base's files, if they are at hand


def chosen_neurons(
    model: nn.Module, modules: Mapping[str, nn.Module], config: NeftConfig
) -> dict[str, ChosenNeurons]:
    """The neurons that a config's file or budget chooses, by parameter name.

    ``modules``: those of the parameters that a budget chooses from, by their names.
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
    return _of_budget(model, modules, config)


def _of_file(model: nn.Module, path: str) -> dict[str, ChosenNeurons]:
    is_selection = Path(path).is_file() and SELECTION_KEY in read_header(path).metadata
    return neurons_of(model, Selection.load(path) if is_selection else Patch.load(path))


def neurons_of(model: nn.Module, what: Selection | Patch) -> dict[str, ChosenNeurons]:
    """The neurons of a selection or patch by parameter, which may hold several tensors of the files."""
    tensors = (what.selection if isinstance(what, Patch) else what).tensors
    found = {}
    for parameter, (layout, held) in neurons_by_weight(model, tensors).items():
        index = np.concatenate([index for _, _, index in held])
        order, values = np.argsort(index, kind="stable"), None
        if isinstance(what, Patch):
            parts = [from_bytes(what.values(name)[here], tensors[name].info.dtype) for name, here, _ in held]
            values = torch.cat(parts)[torch.from_numpy(order)]
        found[parameter] = ChosenNeurons(layout, index[order], values)
    return found


def _of_budget(
    model: nn.Module, modules: Mapping[str, nn.Module], config: NeftConfig
) -> dict[str, ChosenNeurons]:
    budget = Budget(
        neurons=None if config.neurons is None else Amount.parse(config.neurons),
        params=None if config.params is None else Amount.parse(config.params),
        policy="random" if config.policy == "random" else "sensitive",
        seed=config.seed,
    )
    own: Any = getattr(model, "config", None)
    infos = {
        name: TensorInfo(name, "F32", weight_shape(module, name.rpartition(".")[2]))
        for name, module in modules.items()
    }
    layers = {name: info for name, info in infos.items() if forward_of(modules[name])}
    axis = {name: 0 for name, info in layers.items() if len(info.shape) > 2}  # of convolutions
    if own is None:
        axis |= {name: 1 for name, module in modules.items() if type(module).__name__ == "Conv1D"}
    anatomy = read_anatomy(
        config.anatomy,
        infos,
        own.to_dict() if hasattr(own, "to_dict") else None,
        axis=axis,
        include=config.include,
    )
    if not anatomy.scored:
        raise MismatchError(
            "no neuron can be chosen",
            found="no module that target_modules and exclude_modules allow" if not infos else None,
            hint="name modules of the model, or include=[...] tensors that are left out",
        )
    scores = [_scores(config.policy, model, modules[one.info.name], one) for one in anatomy.scored]
    return _choose(anatomy.scored, scores, budget, sum(info.elements for info in infos.values()))


def _scores(
    policy: DatalessPolicy, model: nn.Module, module: nn.Module, tensor: NeuronTensor
) -> Float64Array:
    """What a neuron of ``tensor`` adds to the score of its unit, ``[neurons]``."""
    if policy == "random":
        return np.zeros(tensor.layout.count)
    weight: Tensor = module._parameters[tensor.info.name.rpartition(".")[2]]  # type: ignore[assignment]
    if not is_plain(weight):
        weight = quantization_of(model, module).get_base_weight(module)
    others = [axis for axis in range(weight.dim()) if axis not in tensor.axes]
    power = 2 if policy == "norm" else 1
    sums = weight.detach().double().abs().pow(power).sum(others)
    return np.asarray(sums.flatten().cpu().numpy(), np.float64)


def _choose(
    tensors: Sequence[NeuronTensor], scores: Sequence[Float64Array], budget: Budget, parameters: int
) -> dict[str, ChosenNeurons]:
    """The best units of the anatomy, or neurons each for itself, by the mean score of their weights."""
    counts = [tensor.layout.count for tensor in tensors]
    home, widths = np.repeat(np.arange(len(tensors)), counts), np.array([one.layout.width for one in tensors])
    starts = itertools.accumulate(counts, initial=0)
    ids = np.concatenate([_unit_ids(one, start) for one, start in zip(tensors, starts, strict=False)])
    inside = np.flatnonzero(ids >= 0)
    _, first, unit = np.unique(ids[inside], return_index=True, return_inverse=True)
    costs = np.bincount(unit, widths[home[inside]]).astype(np.int64)
    means = (np.bincount(unit, np.concatenate(scores)[inside]) / costs).astype(np.float32)
    homes = home[inside][first]  # of each unit, its first tensor
    bounds = np.flatnonzero((np.diff(homes) != 0) | (np.diff(costs) != 0)) + 1
    blocks = [
        Block(tensors[homes[run[0]]].info.name, tensors[homes[run[0]]].layer, int(costs[run[0]]), means[run])
        for run in np.split(np.arange(len(homes)), bounds)
    ]
    chosen = np.zeros(len(ids), np.bool_)
    chosen[inside] = np.concatenate(choose(blocks, budget, parameters=parameters))[unit]
    masks = zip(tensors, np.split(chosen, np.cumsum(counts)[:-1]), strict=True)
    return {
        one.info.name: ChosenNeurons(one.layout, np.flatnonzero(mask)) for one, mask in masks if mask.any()
    }


def _unit_ids(tensor: NeuronTensor, start: int) -> Int64Array:
    """The unit of each neuron, -1 for none; without units, a neuron is one by itself, from ``start`` on."""
    if tensor.units is not None:
        return tensor.units.ids()
    ids = np.arange(start, start + tensor.layout.count)
    return ids if tensor.part is None else np.where(tensor.part.mask(), ids, -1)
