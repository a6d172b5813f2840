"""Planning an attachment: find every tensor in the model and check that it fits, before anything changes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import require_tensors
from ..errors import MismatchError, NeftError, UsageError
from ..live.placement import neurons_by_weight
from ..live.weights import can_represent, from_bytes, is_plain, read_vectors
from ..neurons.layout import Layout
from ..neurons.vectors import gather
from ..patch.patch import Patch
from ..selection.selection import Chosen, Selection
from ..text import some
from .attached_neurons import AttachedNeurons, AttachedPart, NeuronKind
from .base_checkpoint import check_weights, checked_values, float_dtype
from .forwards import LayerForward, forward_of
from .install import has_foreign_forward, has_trainable_neurons, neurons_of_weight

log = logging.getLogger(__name__)

ModeOption: TypeAlias = Literal["auto", "scatter", "overlay"]
SkipOption: TypeAlias = Literal["unattachable"] | None


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


Planned: TypeAlias = tuple[list[WeightPlan], dict[str, str]]
"""The plans, and why each tensor that is left out cannot be attached."""


@dataclass(frozen=True)
class _ParameterUse:
    """A module that has the parameter: its path in the model, and the attribute."""

    module: nn.Module
    attribute: str
    path: str


def plan_weights(
    model: nn.Module,
    what: Selection | Patch,
    base: Checkpoint | None,
    mode: ModeOption,
    trainable: bool,
    skip: SkipOption,
) -> Planned:
    """Plan how each tensor of ``what`` is attached to the model; errors as in `attach`."""
    if mode not in ("auto", "scatter", "overlay"):
        raise UsageError("there is no such mode", expected="auto, scatter or overlay", found=mode)
    tensors = (what.selection if isinstance(what, Patch) else what).tensors
    if not any(len(chosen.index) for chosen in tensors.values()):
        raise MismatchError("no neuron is chosen", hint="attach a selection that is not empty")
    if trainable and has_trainable_neurons(model):
        raise UsageError(
            "this model already has trainable neurons",
            hint="detach() them, or attach one selection of all neurons",
        )
    if skip not in (None, "unattachable"):
        raise UsageError("there is no such way to skip", expected="None or unattachable", found=skip)
    skipped: dict[str, str] = {}
    while True:
        left = {name: chosen for name, chosen in tensors.items() if name not in skipped}
        try:
            plans = _plan_all(model, left, mode, trainable)
        except NeftError as error:
            if skip is None or error.tensor not in left or isinstance(error, _ShapeError):
                raise
            skipped[error.tensor] = error.what
            if all(name in skipped for name, chosen in tensors.items() if len(chosen.index)):
                raise
        else:
            break
    if skipped:
        reason = next(iter(skipped.values()))
        log.warning("left out: %s cannot be attached (the first: %s)", some([*skipped]), reason)
    return [_with_values(plan, what, base) for plan in plans], skipped


class _ShapeError(MismatchError):
    """The model is another one: no reason to leave a tensor out."""


def _plan_all(
    model: nn.Module, tensors: Mapping[str, Chosen], mode: ModeOption, trainable: bool
) -> list[WeightPlan]:
    """The plans, still without values; an error names the tensor that cannot be attached."""
    all_uses, parameters = _parameter_uses(model), dict(model.named_parameters(remove_duplicate=False))
    plans = []
    for parameter, (layout, parts) in _parts(model, tensors).items():
        uses = all_uses[id(parameters[parameter])]
        neurons, layers, readers = _plan_neurons(layout, parts, uses, mode, trainable)
        check_overlap(neurons)
        plans.append(WeightPlan(neurons, None, layers, readers))
    return plans


def _parts(
    model: nn.Module, tensors: Mapping[str, Chosen]
) -> dict[str, tuple[Layout, tuple[AttachedPart, ...]]]:
    """The layout of each parameter of the model, and the parts that it holds, in the order of its neurons."""
    found = {}
    chosen = {name: one for name, one in tensors.items() if len(one.index)}
    for parameter, (layout, held) in neurons_by_weight(model, chosen).items():
        parts, start = list[AttachedPart](), 0
        for name, here, index in sorted(held, key=lambda one: int(one[2].min())):
            if here[-1] - here[0] >= len(here):
                raise MismatchError(
                    "transformers deals its neurons out to several weights", tensor=name, found=parameter
                )
            part = replace(chosen[name], index=chosen[name].index[here])
            parts.append(AttachedPart(part, index, int(here[0]), start))
            start += len(index)
        found[parameter] = layout, tuple(parts)
    return found


def _parameter_uses(model: nn.Module) -> Mapping[int, list[_ParameterUse]]:
    """The modules that have each parameter, by its id: several for tied weights."""
    uses: dict[int, list[_ParameterUse]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append(_ParameterUse(module, attribute, path))
    return uses


def _plan_neurons(
    layout: Layout,
    parts: tuple[AttachedPart, ...],
    uses: Iterable[_ParameterUse],
    mode: ModeOption,
    trainable: bool,
) -> tuple[AttachedNeurons, tuple[tuple[nn.Module, LayerForward], ...], tuple[tuple[nn.Module, str], ...]]:
    owner, *others = uses
    weight: Any = owner.module._parameters[owner.attribute]
    name = parts[0].name
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
    for part in parts:
        float_dtype(part.chosen)  # refuses codes
    if plain:
        _check_shape(name, layout, tuple(weight.shape))
    if mode == "scatter" and not trainable:
        return AttachedNeurons(parts, layout, owner.module, owner.attribute, None, mode, trainable), (), ()
    layers, readers, kinds = [], [], set[NeuronKind]()
    for use in (owner, *others):
        forward, kind = _plan_layer(name, layout, use, plain)
        if forward is None or not forward.quantized:
            readers.append((use.module, use.attribute))
        if forward is not None and kind is not None:
            layers.append((use.module, forward))
            kinds.add(kind)
    if len(kinds) > 1:  # a tied weight: the outputs of one layer and the inputs of another
        layers, kinds = [], set()
    kind = next(iter(kinds), None)
    neurons = AttachedNeurons(parts, layout, owner.module, owner.attribute, kind, mode, trainable)
    return neurons, tuple(layers), tuple(readers)


def _check_shape(name: str, layout: Layout, found: tuple[int, ...]) -> None:
    if found != layout.shape:
        raise _ShapeError(
            "the model's weight has another shape",
            tensor=name,
            expected=list(layout.shape),
            found=list(found),
        )


def _plan_layer(
    name: str, layout: Layout, use: _ParameterUse, plain: bool
) -> tuple[LayerForward | None, NeuronKind | None]:
    """How the module computes with the neurons; two times None: its weight carries them, whatever it does."""
    module: Any = use.module
    forward, kind = forward_of(module), None
    foreign = has_foreign_forward(module)
    if forward is not None and not foreign and forward.covers(module):
        if use.attribute == "weight":
            kind = forward.kind_of(layout.axes)
        elif use.attribute == "bias" and layout.axes == (0,):
            kind = "bias"
    if forward is not None and kind is not None and getattr(module, "max_norm", None) is None:
        if forward.quantized and use.attribute == "weight":
            _check_shape(name, layout, (module.out_features, module.in_features))
        return forward, kind
    quantized = not plain or (forward is not None and forward.quantized)
    if (problem := unreadable(module, use.attribute, quantized, foreign)) is not None:
        raise UsageError(
            f"these neurons cannot be trained: {problem}",
            tensor=name,
            found=f"axes {list(layout.axes)} of {use.path or type(module).__name__}.{use.attribute}",
        )
    return None, None


def unreadable(module: nn.Module, attribute: str, quantized: bool, foreign: bool) -> str | None:
    """Why a weight cannot carry neurons for what reads it; None if it can.

    ``foreign``: whether another tool replaced the module's forward pass.
    """
    if getattr(module, "max_norm", None) is not None:
        return "its module uses max_norm, which changes the weight in every forward pass"
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled its module"
    if isinstance(inspect.getattr_static(type(module), attribute, None), property):
        return "its module hides it behind a property"
    if quantized and foreign:
        return "it is quantized or sharded, and another tool replaced its module's forward pass"
    if quantized:
        return f"it is quantized or sharded, and how a {type(module).__name__} computes is not known"
    return None


def check_overlap(neurons: AttachedNeurons) -> None:
    """Raise a `UsageError` if some of the neurons are attached already."""
    for other in neurons_of_weight(neurons.module, neurons.attribute):
        if other.layout.axes == neurons.layout.axes:
            shared = int(torch.isin(other.index, neurons.index).sum())
            if not shared:
                continue
            problem = f"{shared} of these neurons are attached already"
        else:
            problem = "neurons along the other axis of this weight are attached already"
        raise UsageError(
            problem,
            tensor=neurons.name,
            hint="detach() or switch() the attached patch, or merge the two patches",
        )


def _with_values(plan: WeightPlan, what: Selection | Patch, base: Checkpoint | None) -> WeightPlan:
    """The plan with its values, after checking what the weight holds."""
    neurons = plan.neurons
    weight, plain = neurons.weight.detach(), is_plain(neurons.weight)
    vectors = read_vectors(weight, neurons.layout, neurons.index) if plain else None
    values = [
        _part_values(
            part, None if vectors is None else vectors[part.positions], neurons.trainable, what, base
        )
        for part in neurons.parts
    ]
    found = [value for value in values if value is not None]
    neurons.saved = vectors if neurons.trainable or neurons.mode == "scatter" else None
    return replace(plan, values=torch.cat(found) if found else None)


def _part_values(
    part: AttachedPart,
    vectors: Tensor | None,
    trainable: bool,
    what: Selection | Patch,
    base: Checkpoint | None,
) -> Tensor | None:
    """The values of one part; ``vectors``: those of the live weight, None if it is quantized."""
    chosen = part.chosen
    exact = vectors is not None and can_represent(vectors.dtype, float_dtype(chosen))
    if base is not None and (trainable or not exact):
        require_tensors(base, [chosen.info], "the selection")
    if vectors is not None and trainable and not exact:
        raise MismatchError(
            "the model's dtype cannot hold the checkpoint's values exactly",
            tensor=part.name,
            expected=chosen.info.dtype,
            found=vectors.dtype,
            hint='load the model with dtype="auto" or a wider one',
        )
    if isinstance(what, Patch):
        return checked_values(what, chosen, part.first, vectors, base)
    if vectors is not None:
        check_weights(vectors, chosen, base)
        return None
    if base is None:
        raise UsageError(
            "the weight is quantized, so its neurons' first values must come from the base's files",
            tensor=part.name,
            hint="name the checkpoint before quantization with base=FOLDER",
        )
    raw = gather(base, chosen.info, chosen.layout, chosen.index)
    return from_bytes(raw, chosen.info.dtype).float()
