"""The gradient probe: neurons scored by their squared gradients, summed over some batches.

A neuron's score is the sum over batches of the squared norm of the loss's gradient by its vector: a
diagonal empirical Fisher information of whole neurons. It needs no second model and no optimizer; a
weight's gradient is summed up and freed as soon as it is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..anatomy.anatomy import Anatomy
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.document import dump
from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import Layout
from ..checkpoint.tensorfile import written_file
from ..errors import MismatchError
from ..selection.scores import SCORES_KEY, SCORES_VERSION, Scores
from ..surgery.diff import describe_side, describe_tensor
from ..tuning.names import live_names

__all__ = ["gradient_scores", "gradient_sums"]


def gradient_sums(
    model: nn.Module, layouts: Mapping[str, Layout], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, NDArray[np.float64]]:
    """Per live parameter of ``layouts`` its neurons' squared gradients, summed over ``batches``, ``[n]``.

    Raises
    ------
    MismatchError
        If the loss is no number.
    """
    model.eval()  # no dropout: what counts is the neuron, not the draw
    parameters: dict[str, Any] = {name: model.get_parameter(name) for name in layouts}
    sums = {name: torch.zeros(layout.count, dtype=torch.float64) for name, layout in layouts.items()}
    with _only(model, parameters.values()):
        hooks = [
            parameter.register_post_accumulate_grad_hook(_adder(sums[name], layouts[name]))
            for name, parameter in parameters.items()
        ]
        try:
            for batch in batches:
                loss = model(**batch).loss
                if not torch.isfinite(loss.detach()):
                    raise MismatchError("the loss of the base model is no number", found=loss.item())
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return {name: total.numpy() for name, total in sums.items()}


def _adder(total: Tensor, layout: Layout) -> Any:
    others = [axis for axis in range(len(layout.shape)) if axis not in layout.axes]

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook comes after it
        norms = torch.linalg.vector_norm(parameter.grad, dim=others, dtype=torch.float32)
        total.add_(norms.reshape(-1).cpu().double().square())
        parameter.grad = None

    return add


@contextmanager
def _only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Have gradients of these parameters and no others, for a while."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in chosen}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def gradient_scores(
    model: nn.Module,
    base: Checkpoint,
    anatomy: Anatomy,
    batches: Iterable[Mapping[str, Tensor]],
    out: str | os.PathLike[str] | None = None,
) -> Scores:
    """Score the neurons of ``anatomy`` by their gradients, in a scores file.

    Parameters
    ----------
    model:
        The live model of ``base``.
    batches:
        What the model takes, ``labels`` included, on its device.
    out:
        Where to. None: a temporary file.
    """
    live = live_names(model, [tensor.info.name for tensor in anatomy.scored])
    sums = gradient_sums(model, {live[t.info.name]: t.layout for t in anatomy.scored}, batches)
    values = {t.info.name: sums[live[t.info.name]] for t in anatomy.scored}
    for tensor in anatomy.scored:
        if tensor.part is not None:
            values[tensor.info.name][~tensor.part.mask()] = np.nan
    units = _units(anatomy, values)
    biases = {t.bias for t in anatomy.scored if t.bias is not None}
    followers = [entry.info for entry in anatomy.listed if entry.info.name in biases]
    facts = {
        "version": SCORES_VERSION,
        "score": "gradient",
        "anatomy": anatomy.name,
        "parameters": base.parameters,
        "base": describe_side(base),
        "nonfinite": 0,
        "tensors": {tensor.info.name: describe_tensor(tensor) for tensor in anatomy.scored},
        "unscored": {info.name: _follower(info) for info in followers},
    }
    entries = [TensorInfo(name, "F32", value.shape) for name, value in values.items()]
    entries += [TensorInfo(f"{name}:unit", "I64", ids.shape) for name, ids in units.items()]
    entries += [TensorInfo(f"{info.name}:changed", "I64", (info.elements,)) for info in followers]
    metadata = dump(SCORES_KEY, facts)
    with written_file(entries, metadata, out) as written:
        for name, value in values.items():
            written.writer.write(name, 0, value.astype(np.float32))
        for name, ids in units.items():
            written.writer.write(f"{name}:unit", 0, ids)
        for info in followers:  # nothing changed yet; that it is listed lets it follow its neurons
            written.writer.write(f"{info.name}:changed", 0, np.zeros(info.elements, np.int64))
        written.writer.finish(metadata)
    return Scores.read(written.reader())


def _units(anatomy: Anatomy, values: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.int64]]:
    """The unit of every neuron, where there are units; each member's score becomes its unit's."""
    ids = {t.info.name: t.units.ids() for t in anatomy.scored if t.units is not None}
    if ids:
        total = np.zeros(1 + max(int(unit.max()) for unit in ids.values()))
        for name, unit in ids.items():
            mine = unit >= 0
            np.add.at(total, unit[mine], values[name][mine])
        for name, unit in ids.items():
            values[name] = np.where(unit >= 0, total[unit], np.nan)
    return ids


def _follower(info: TensorInfo) -> dict[str, Any]:
    axes = list(range(len(info.shape)))
    return {"reason": "bias", "shape": list(info.shape), "dtype": info.dtype, "neuron_axes": axes}
