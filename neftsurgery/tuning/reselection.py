"""Training other neurons of a model than before: what stays of values and of an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import UsageError
from .attached_neurons import AttachedNeurons


def check_states(old: Mapping[AttachedNeurons, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Raise a `UsageError` unless `carry_over` can divide what the optimizer holds of the neurons."""
    if len(optimizers) > 1:
        raise UsageError("several optimizers train these neurons", hint="detach(), and attach anew")
    for neurons, rows in old.items():
        held = [value for each in optimizers for value in each.state.get(rows, {}).values()]
        tensors = [value for value in held if isinstance(value, Tensor) and value.numel() > 1]
        flat = rows.untyped_storage().nbytes() != rows.nbytes  # a view of an optimizer's own buffer
        if flat or any(each.shape != rows.shape or not each.is_floating_point() for each in tensors):
            raise UsageError(
                "the optimizer's state of these neurons cannot be divided among them",
                tensor=neurons.name,
                hint="use an optimizer that keeps numbers for each value, such as AdamW",
            )


def carry_over(
    old: Mapping[AttachedNeurons, Tensor], new: Sequence[AttachedNeurons], optimizers: Iterable[Optimizer]
) -> None:
    """Give ``new`` neurons the ``old`` values of the same ones, and the optimizer their rows and state."""
    earlier = {(neurons.module, neurons.attribute, neurons.layout): neurons for neurons in old}
    same = {each: earlier.get((each.module, each.attribute, each.layout)) for each in new}
    gone = {id(rows) for rows in old.values()}
    for after, before in same.items():
        if before is not None:
            after.rows.data = _moved(old[before].detach(), after.rows.detach(), after, before)
    for optimizer in optimizers:
        groups = [group for group in optimizer.param_groups if any(id(p) in gone for p in group["params"])]
        homes = {id(p): group for group in groups for p in group["params"]}
        for after, before in same.items():
            rows = None if before is None else old[before]
            homes.get(id(rows), groups[0])["params"].append(after.rows)
            if before is not None and (held := optimizer.state.get(old[before])):
                zeros = torch.zeros_like(after.rows)
                moved = {key: _moved(value, zeros, after, before) for key, value in held.items()}
                optimizer.state[after.rows] = moved
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for rows in old.values():
            optimizer.state.pop(rows, None)


def _moved(value: Any, start: Tensor, after: AttachedNeurons, before: AttachedNeurons) -> Any:
    """``start``, with what ``value`` holds of the neurons that are both ``before`` and ``after``."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    index, earlier = after.index.cpu().numpy(), before.index.cpu().numpy()
    _, here, there = np.intersect1d(index, earlier, assume_unique=True, return_indices=True)
    moved = start.to(value.dtype, copy=True)
    moved[torch.from_numpy(here)] = value[torch.from_numpy(there)]
    return moved
