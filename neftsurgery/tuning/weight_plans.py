"""Planning an attachment: find every tensor in the model and check that it fits, before anything changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import require_tensors
from ..errors import MismatchError, UsageError
from ..live.names import live_names
from ..live.weights import can_represent, from_bytes, is_plain, read_vectors
from ..patch.patch import Patch
from ..selection.selection import Chosen, Selection
from .attached_neurons import AttachedNeurons, Mode, NeuronKind
from .base_checkpoint import base_vectors, check_weights, checked_values, float_dtype
from .forwards import LayerForward, forward_of
from .install import has_foreign_forward, has_trainable_neurons, neurons_of_weight

__all__ = ["ModeOption", "WeightPlan", "plan_weights"]

ModeOption: TypeAlias = Literal["auto", "scatter", "overlay"]


@dataclass(frozen=True)
class WeightPlan:
    """How the chosen neurons of one tensor are attached."""

    neurons: AttachedNeurons  # the neurons, not yet installed
    values: Tensor | None  # their values, ``[k, width]``; None: the vectors that the weight holds
    # The modules whose forward pass is replaced, and how they compute.
    layers: tuple[tuple[nn.Module, LayerForward], ...] = ()
    # The modules and attributes by which the weight is read with its neurons. There are neither of the two
    # where a patch's values are written into the weight.
    uses: tuple[tuple[nn.Module, str], ...] = ()


@dataclass(frozen=True)
class _ParameterUse:
    """A module that has the parameter: its path in the model, and the attribute."""

    module: nn.Module
    attribute: str
    path: str


def plan_weights(
    model: nn.Module,
    what: Selection | Patch,
    *,
    base: Checkpoint | None,
    mode: ModeOption,
    trainable: bool,
) -> list[WeightPlan]:
    """Plan how each tensor of ``what`` is attached to the model; errors as in `attach`."""
    if mode not in ("auto", "scatter", "overlay"):
        raise UsageError("there is no such mode", expected="auto, scatter or overlay", found=mode)
    if not isinstance(what, (Selection, Patch)):
        raise UsageError("attach takes a Selection or a Patch", found=type(what).__name__)
    tensors = (what.selection if isinstance(what, Patch) else what).tensors
    if not any(len(chosen.index) for chosen in tensors.values()):
        raise MismatchError("no neuron is chosen", hint="attach a selection that is not empty")
    if trainable and has_trainable_neurons(model):
        raise UsageError(
            "this model already has trainable neurons",
            hint="detach() them, or attach one selection of all neurons",
        )
    names = live_names(model, tensors)
    all_uses, parameters = _parameter_uses(model), dict(model.named_parameters(remove_duplicate=False))
    plans = []
    for name, chosen in tensors.items():
        if len(chosen.index):
            uses = all_uses[id(parameters[names[name]])]
            neurons, layers, readers = _plan_neurons(chosen, uses, mode, trainable)
            _check_overlap(neurons)
            plans.append(WeightPlan(neurons, _values(neurons, what, base), layers, readers))
    return plans


def _parameter_uses(model: nn.Module) -> Mapping[int, list[_ParameterUse]]:
    """The modules that have each parameter, by its id: several for tied weights."""
    uses: dict[int, list[_ParameterUse]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(_ParameterUse(module, attribute, path))
    return uses


def _plan_neurons(
    chosen: Chosen, uses: Iterable[_ParameterUse], mode: ModeOption, trainable: bool
) -> tuple[AttachedNeurons, tuple[tuple[nn.Module, LayerForward], ...], tuple[tuple[nn.Module, str], ...]]:
    owner, *others = uses
    weight: Any = owner.module._parameters[owner.attribute]
    name = chosen.info.name
    if weight.is_meta:
        raise UsageError(
            "the weight is not in memory", tensor=name, hint="load the model without offloading (device_map)"
        )
    plain = is_plain(weight)
    if mode == "scatter" and not plain:
        raise UsageError(
            "values cannot be written into a quantized or sharded weight",
            tensor=name,
            found=f"{weight.dtype} {type(weight.data).__name__}",
            hint='attach with mode="overlay"',
        )
    if mode == "auto":
        mode = "scatter" if plain else "overlay"
    float_dtype(chosen)  # refuses codes
    for use in (owner, *others):
        if getattr(use.module, "max_norm", None) is not None:
            raise UsageError(
                f"neurons of {use.path} cannot be trained: it uses max_norm, "
                "which changes the weight in every forward pass",
                tensor=name,
            )
    if plain:
        _check_shape(chosen, tuple(weight.shape))
    if mode == "scatter" and not trainable:
        return AttachedNeurons(chosen, owner.module, owner.attribute, None, mode, trainable), (), ()
    layers, readers, kinds = [], [], set[NeuronKind]()
    for use in (owner, *others):
        forward, kind = _plan_layer(chosen, use, mode, plain)
        if forward is None or not forward.quantized:
            readers.append((use.module, use.attribute))
        if forward is not None and kind is not None:
            layers.append((use.module, forward))
            kinds.add(kind)
    if len(kinds) > 1:  # a tied weight: the outputs of one layer and the inputs of another
        layers, kinds = [], set()
    kind = next(iter(kinds), None)
    neurons = AttachedNeurons(chosen, owner.module, owner.attribute, kind, mode, trainable)
    return neurons, tuple(layers), tuple(readers)


def _check_shape(chosen: Chosen, found: tuple[int, ...]) -> None:
    if found != chosen.info.shape:
        raise MismatchError(
            "the model's weight has another shape",
            tensor=chosen.info.name,
            expected=list(chosen.info.shape),
            found=list(found),
        )


def _plan_layer(
    chosen: Chosen, use: _ParameterUse, mode: Mode, plain: bool
) -> tuple[LayerForward | None, NeuronKind | None]:
    """How the module computes with the neurons; two times None: its weight carries them, whatever it does."""
    module: Any = use.module
    forward, kind, axes = forward_of(module), None, chosen.layout.axes
    foreign = has_foreign_forward(module)
    if forward is not None and not foreign and forward.covers(module, mode):
        if use.attribute == "weight":
            kind = forward.kind_of(axes)
        elif use.attribute == "bias" and tuple(axes) == (0,):
            kind = "bias"
    if kind is None:
        problem = _unattachable(use)
        if not plain and forward is not None and foreign:
            problem = "its forward pass was replaced by another tool"
        elif not plain or (forward is not None and forward.quantized):
            problem = (
                f"its forward pass ({type(module).__name__}) is not known, and it is quantized or sharded"
            )
        if problem is not None:
            raise UsageError(
                f"these neurons cannot be trained: {problem}",
                tensor=chosen.info.name,
                found=f"axes {list(axes)} of {use.path or type(module).__name__}.{use.attribute}",
            )
        return None, None
    assert forward is not None  # it has a kind
    if forward.quantized and use.attribute == "weight":
        _check_shape(chosen, (module.out_features, module.in_features))
    return forward, kind


def _unattachable(use: _ParameterUse) -> str | None:
    """Why the weight cannot be read with neurons in it; None if it can."""
    module: Any = use.module
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled its module"
    if isinstance(inspect.getattr_static(type(module), use.attribute, None), property):
        return "its module hides it behind a property"
    return None


def _check_overlap(neurons: AttachedNeurons) -> None:
    for other in neurons_of_weight(neurons.module, neurons.attribute):
        if other.chosen.layout.axes == neurons.chosen.layout.axes:
            shared = np.intersect1d(other.chosen.index, neurons.chosen.index)
            if not len(shared):
                continue
            problem = f"{len(shared)} of these neurons are attached already"
        else:
            problem = "neurons along the other axis of this weight are attached already"
        raise UsageError(
            problem,
            tensor=neurons.name,
            hint="detach() or switch() the attached patch, or merge the two patches",
        )


def _values(neurons: AttachedNeurons, what: Selection | Patch, base: Checkpoint | None) -> Tensor | None:
    """The values to install, after checking what the weight holds."""
    chosen, weight = neurons.chosen, neurons.weight.detach()
    dtype = float_dtype(chosen)
    vectors = read_vectors(weight, chosen.layout, neurons.index) if is_plain(neurons.weight) else None
    exact = vectors is not None and can_represent(vectors.dtype, dtype)
    if base is not None and (neurons.trainable or not exact):
        require_tensors(base, [chosen.info], "the selection")
    if vectors is not None and neurons.trainable and not exact:
        raise MismatchError(
            "the model's dtype cannot hold the checkpoint's values exactly",
            tensor=chosen.info.name,
            expected=chosen.info.dtype,
            found=vectors.dtype,
            hint='load the model with dtype="auto" or a wider one',
        )
    if isinstance(what, Patch):
        return checked_values(what, chosen.info.name, vectors, base)
    if vectors is not None:
        check_weights(vectors, chosen, base)
        return None
    if base is None:
        raise UsageError(
            "the weight is quantized, so its neurons' first values must come from the base's files",
            tensor=chosen.info.name,
            hint="name the checkpoint before quantization with base=FOLDER",
        )
    return from_bytes(base_vectors(base, chosen), chosen.info.dtype).float()
