"""Units that change places in a whole model, by what the table says of its names: is it heard?

The experiments of `feed_forward` and `attention` swap units of one module. This one knows no module: it takes
the units that the anatomy ``units`` finds in the names and the config, and runs the model on the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from neftsurgery.neurons.anatomy import NeuronTensor, read_anatomy
from neftsurgery.neurons.layout import Layout
from neftsurgery.tensors.header import TensorInfo

__all__ = ["swapped_output", "unit_blocks"]


def unit_blocks(model: Any) -> list[list[NeuronTensor]]:
    """The tensors of each block of units of a live model."""
    infos = {name: TensorInfo(name, "F32", tuple(value.shape)) for name, value in model.state_dict().items()}
    blocks: dict[int, list[NeuronTensor]] = {}
    for tensor in read_anatomy("units", infos, model.config.to_dict()).scored:
        assert tensor.units is not None
        blocks.setdefault(tensor.units.base, []).append(tensor)
    return list(blocks.values())


def swapped_output(model: Any, tensors: list[NeuronTensor], inputs: Mapping[str, Any]) -> Any:
    """What the model says with the first and the last unit of a block in each other's place."""
    state = model.state_dict()
    kept = {}
    with torch.no_grad():
        for tensor in tensors:
            units = tensor.units
            assert units is not None
            ids = units.ids() - units.base
            last = units.outer * units.units - 1 if units.outer == 1 else units.units - 1
            here, there = np.flatnonzero(ids == 0), np.flatnonzero(ids == last)
            order = np.arange(len(ids))
            order[here], order[there] = there, here
            for name in (tensor.info.name, tensor.bias):
                if name is not None:
                    value = state[name]
                    kept[name] = value.clone()
                    axes = tensor.axes if name == tensor.info.name else tuple(range(value.ndim))
                    value.copy_(_reordered(value, axes, order))
        try:
            return model(**inputs)[0]
        finally:
            for name, value in kept.items():
                state[name].copy_(value)


def _reordered(value: torch.Tensor, axes: tuple[int, ...], order: Any) -> torch.Tensor:
    """``value`` with its neurons in another order."""
    layout = Layout.of(value.shape, axes)
    front = value.movedim(axes, tuple(range(len(axes))))
    flat = front.reshape(layout.count, -1)[torch.from_numpy(order)]
    return flat.reshape(front.shape).movedim(tuple(range(len(axes))), axes)
