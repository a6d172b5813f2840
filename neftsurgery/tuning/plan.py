"""Attaching is planned before anything changes: tensors are found, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..patch.patch import Patch
from ..selection.selection import Chosen, Selection
from .base import check_live, checked_values, file_rows
from .names import live_names
from .neurons import Mode, Neurons, Side
from .operations import Operation, operation_of, why_not
from .vectors import from_bytes, gather, holds, is_plain, torch_dtype
from .wiring import has_own_forward, is_training, neurons_at

__all__ = ["ModeOption", "Placement", "plan"]

ModeOption: TypeAlias = Literal["auto", "scatter", "overlay"]


@dataclass(frozen=True)
class Placement:
    """Where the chosen neurons of one tensor go.

    Attributes
    ----------
    neurons:
        The neurons, not yet in force.
    uses:
        The modules whose forward pass is to compute with them, and how they do; empty where the
        weight itself holds values that nobody trains.
    values:
        What to put in; None: what is there.
    """

    neurons: Neurons
    uses: tuple[tuple[nn.Module, Operation], ...]
    values: Tensor | None


@dataclass(frozen=True)
class _Use:
    """A module that has a weight, under which attribute and path."""

    module: nn.Module
    attribute: str
    path: str


def plan(
    model: nn.Module,
    what: Selection | Patch,
    *,
    files: Checkpoint | None,
    mode: ModeOption,
    trainable: bool,
) -> list[Placement]:
    """Find every tensor of ``what`` in the model.

    Raises
    ------
    MismatchError
        If the selection or the patch does not fit the model or its base.
    UsageError
        If the model's layers, or what is attached already, do not allow it.
    """
    if mode not in ("auto", "scatter", "overlay"):
        raise UsageError("there is no such mode", expected="auto, scatter or overlay", found=mode)
    if not isinstance(what, (Selection, Patch)):
        raise UsageError("attach takes a Selection or a Patch", found=type(what).__name__)
    chosen = (what.selection if isinstance(what, Patch) else what).tensors
    if not any(len(c.index) for c in chosen.values()):
        raise MismatchError("no neuron is chosen", hint="there is nothing to attach")
    if trainable and is_training(model):
        raise UsageError(
            "neurons of this model are being trained already",
            hint="detach() them, or select all of them at once",
        )
    names = live_names(model, chosen)
    users = _users(model)
    placements = []
    for name, one in chosen.items():
        if len(one.index):
            uses = users[id(model.get_parameter(names[name]))]
            neurons, operations = _place(one, uses, mode, trainable)
            _refuse_overlap(neurons)
            placements.append(Placement(neurons, operations, _values(neurons, what, files)))
    return placements


def _users(model: nn.Module) -> Mapping[int, list[_Use]]:
    users: dict[int, list[_Use]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(_Use(module, attribute, path))
    return users


def _place(
    chosen: Chosen, uses: Iterable[_Use], mode: ModeOption, trainable: bool
) -> tuple[Neurons, tuple[tuple[nn.Module, Operation], ...]]:
    owner, *others = uses
    weight = getattr(owner.module, owner.attribute)
    name = chosen.info.name
    if weight.is_meta:
        raise UsageError(
            "the weight is not in memory", tensor=name, hint="load the model without offloading (device_map)"
        )
    plain = is_plain(weight)
    if mode == "scatter" and not plain:
        raise UsageError(
            "a weight that is quantized or sharded cannot hold values of its own",
            tensor=name,
            found=f"{weight.dtype} {type(weight.data).__name__}",
            hint='attach with mode="overlay"',
        )
    way: Mode = mode if mode != "auto" else "scatter" if plain else "overlay"
    _check_type(chosen, weight, plain)
    if way == "scatter" and not trainable:
        return Neurons(chosen, owner.module, owner.attribute, None, way, trainable), ()
    operations, sides = [], set[Side]()
    for use in (owner, *others):
        operation, side = _operation(chosen, use, way)
        operations.append((use.module, operation))
        sides.add(side)
    if len(sides) > 1:
        raise UsageError("the weight is tied to one that is used the other way round", tensor=name)
    return Neurons(chosen, owner.module, owner.attribute, sides.pop(), way, trainable), tuple(operations)


def _check_type(chosen: Chosen, weight: Tensor, plain: bool) -> None:
    kind = torch_dtype(chosen.info.dtype)
    if kind is None:
        raise MismatchError(
            "only plain floating-point numbers can be put into a live model",
            tensor=chosen.info.name,
            expected="F64, F32, F16 or BF16",
            found=chosen.info.dtype,
        )
    if plain and tuple(weight.shape) != chosen.info.shape:
        raise MismatchError(
            "the live weight has another shape",
            tensor=chosen.info.name,
            expected=list(chosen.info.shape),
            found=list(weight.shape),
        )


def _operation(chosen: Chosen, use: _Use, mode: Mode) -> tuple[Operation, Side]:
    module: Any = use.module
    axes = chosen.layout.axes
    operation = operation_of(module)
    kind = type(module).__name__
    if operation is None or use.attribute not in ("weight", "bias"):
        raise UsageError(
            f"neurons of a {kind} cannot be trained: only those of linear, Conv1D, convolution "
            "and embedding layers can",
            tensor=chosen.info.name,
            found=f"{use.path or kind}.{use.attribute}",
        )
    if (reason := why_not(module, operation, mode)) is not None:
        raise UsageError(f"neurons of {use.path} cannot be trained: {reason}", tensor=chosen.info.name)
    if has_own_forward(module):
        raise UsageError(
            f"the forward pass of {use.path} was replaced by another tool, offloading perhaps",
            tensor=chosen.info.name,
            hint="load the model without device_map",
        )
    side = ("bias" if tuple(axes) == (0,) else None) if use.attribute == "bias" else operation.side(axes)
    if side is None:
        raise UsageError(
            f"neurons along axes {list(axes)} of a {kind}'s {use.attribute} cannot be trained",
            tensor=chosen.info.name,
        )
    if operation.quantized and use.attribute == "weight":
        found = (module.out_features, module.in_features)
        if found != chosen.info.shape:
            raise MismatchError(
                "the live weight has another shape",
                tensor=chosen.info.name,
                expected=list(chosen.info.shape),
                found=list(found),
            )
    return operation, side


def _refuse_overlap(neurons: Neurons) -> None:
    for other in neurons_at(neurons.module, neurons.attribute):
        if other.chosen.layout.axes == neurons.chosen.layout.axes:
            shared = np.intersect1d(other.chosen.index, neurons.chosen.index)
            if not len(shared):
                continue
            what = f"{len(shared)} of these neurons are attached already"
        else:
            what = "neurons along the other axis of this weight are attached already"
        raise UsageError(
            what, tensor=neurons.name, hint="detach() what is attached, or switch() it, or merge the two"
        )


def _values(neurons: Neurons, what: Selection | Patch, files: Checkpoint | None) -> Tensor | None:
    """What to put in, after checking what is there."""
    chosen, weight = neurons.chosen, neurons.weight.detach()
    kind = torch_dtype(chosen.info.dtype)
    assert kind is not None  # `_check_type`
    live = gather(weight, chosen.layout, neurons.index) if is_plain(neurons.weight) else None
    tells = live is not None and holds(live.dtype, kind)
    if files is not None and (neurons.trainable or not tells):
        _check_files(chosen, files)
    if live is not None and neurons.trainable and not tells:
        raise MismatchError(
            "the live weights cannot hold the checkpoint's values exactly",
            tensor=chosen.info.name,
            expected=chosen.info.dtype,
            found=live.dtype,
            hint='load the model with dtype="auto" or a wider one',
        )
    if isinstance(what, Patch):
        return checked_values(what, chosen.info.name, live, files)
    if live is not None:
        check_live(live, chosen, files)
        return None
    if files is None:
        raise UsageError(
            "the weight is quantized, so the values to start from must come from the base's files",
            tensor=chosen.info.name,
            hint="give base=FOLDER of the checkpoint before quantization",
        )
    return from_bytes(file_rows(files, chosen), chosen.info.dtype).to(torch.float32)


def _check_files(chosen: Chosen, files: Checkpoint) -> None:
    found = files.tensors.get(chosen.info.name)
    if found is None or (found.dtype, found.shape) != (chosen.info.dtype, chosen.info.shape):
        raise MismatchError(
            "the selection is not for this base",
            file=files.name,
            tensor=chosen.info.name,
            expected=chosen.info.describe(),
            found=found.describe() if found else "no such tensor",
        )
