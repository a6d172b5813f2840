"""Installing neurons in the modules of a model, and removing them without a trace.

A module keeps its class, its name, its weights and its hooks. What reads a weight finds a `NeuronWeight` in
its place. Where the module's own way to compute is known, ``forward`` of the instance is replaced, which
costs less. ``extra_repr`` shows what is attached.

Trainable values are a parameter of the module, beside its weight, so that everything that looks for
parameters finds them: optimizers, the Trainer, DDP, FSDP, and state dicts (`state_dicts`).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attached_neurons import AttachedNeurons, refuse_pickling
from .forwards import LayerForward, LayerNeurons
from .linear_weight import LinearNeurons
from .neuron_weight import NeuronWeight, WeightNeurons
from .state_dicts import register_state_hooks

Layers: TypeAlias = Iterable[tuple[nn.Module, LayerForward]]
Uses: TypeAlias = Iterable[tuple[nn.Module, str]]

_KEY = "_neurons"  # in the module's __dict__


class _ModuleState:
    """What is installed in one module."""

    def __init__(self) -> None:
        self.owned: list[AttachedNeurons] = []  # neurons of the weights that the module owns
        self.forward: LayerForward | None = None  # how it computes; None if its forward pass is its own
        self.computed: list[AttachedNeurons] = []  # what it computes with
        self.handles: list[RemovableHandle] = []  # of its state-dict hooks, while it owns trainable neurons

    def __deepcopy__(self, memo: dict[int, Any]) -> _ModuleState:
        twin = _ModuleState()
        memo[id(self)] = twin
        twin.owned = copy.deepcopy(self.owned, memo)
        twin.forward, twin.computed = self.forward, copy.deepcopy(self.computed, memo)
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def neurons_in(module: nn.Module) -> list[AttachedNeurons]:
    """The attached neurons that ``module`` owns or computes with."""
    state: _ModuleState | None = module.__dict__.get(_KEY)
    return [] if state is None else list(dict.fromkeys([*state.owned, *state.computed]))


def neurons_of_weight(module: nn.Module, attribute: str) -> list[AttachedNeurons]:
    """The neurons attached to the weight ``attribute``, which ``module`` owns."""
    state: _ModuleState | None = module.__dict__.get(_KEY)
    return [] if state is None else [n for n in state.owned if n.attribute == attribute]


def has_trainable_neurons(model: nn.Module) -> bool:
    """Whether any attached neurons of the model are trainable."""
    return any(neurons.trainable for module in model.modules() for neurons in neurons_in(module))


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether another tool (accelerate's offloading, for one) has replaced the forward of this instance."""
    state: _ModuleState | None = module.__dict__.get(_KEY)
    return "forward" in module.__dict__ and (state is None or state.forward is None)


def install(neurons: AttachedNeurons, values: Tensor | None, layers: Layers, uses: Uses) -> None:
    """Install ``neurons`` with ``values``, and have ``layers`` compute with them; `remove` undoes it.

    ``uses``: the modules and attributes where what reads the weight finds the neurons in it.
    """
    neurons.install(values)
    state = _state(neurons.module)
    state.owned.append(neurons)
    if neurons.trainable and not state.handles:
        state.handles = register_state_hooks(neurons.module)
    for layer, forward in layers:
        if forward.is_lookup and neurons.inverse_index is None:
            neurons.make_inverse_index()
        _replace_forward(layer, neurons, forward)
    _renew_weight(uses, _read(neurons))


def _read(neurons: AttachedNeurons) -> Iterable[AttachedNeurons]:
    """The neurons of the same weight that what reads it has to find."""
    owned = neurons_of_weight(neurons.module, neurons.attribute)
    return (each for each in owned if each.trainable or each.mode == "overlay")


def remove(neurons: AttachedNeurons, layers: Layers, uses: Uses) -> None:
    """The inverse of `install`; also of one that was interrupted."""
    for layer, _ in layers:
        _restore_forward(layer, neurons)
    neurons.remove()
    state = _state(neurons.module)
    if neurons in state.owned:
        state.owned.remove(neurons)
    _renew_weight(uses, _read(neurons))
    if not any(other.trainable for other in state.owned):
        for handle in state.handles:
            handle.remove()
        state.handles = []
    _drop_empty_state(neurons.module)


def _renew_weight(uses: Uses, attached: Iterable[AttachedNeurons]) -> None:
    """Have what reads a weight find the neurons ``attached`` in it; if there are none, the weight itself."""
    found, weight = tuple(attached), None
    if found:
        first = next((neurons for neurons in found if neurons.trainable), found[0])
        read = (LinearNeurons if LinearNeurons.fits(found) else WeightNeurons)(found)
        rows = first.rows if first.trainable else None
        weight = NeuronWeight.of(read, first.weight, rows, first.layout, first.index)
    module: Any
    for module, attribute in uses:
        if weight is not None:
            module.__dict__[attribute] = weight
            # So FSDP2 assigns its shards as attributes, which takes this away: it must find its own weights.
            module.__dict__["__setattr__"] = partial(setattr, module)
        else:
            _restore_weight(module, attribute)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # the list of weights that it computes with


def _restore_weight(module: nn.Module, attribute: str) -> None:
    module.__dict__.pop(attribute, None)
    parameter = module._parameters[attribute]
    if isinstance(parameter, NeuronWeight):  # the model's weights were tied while neurons were attached
        module._parameters[attribute] = parameter.parameter
    if not any(isinstance(value, NeuronWeight) for value in module.__dict__.values()):
        module.__dict__.pop("__setattr__", None)


def _replace_forward(module: nn.Module, neurons: AttachedNeurons, forward: LayerForward) -> None:
    """Have the forward pass of ``module``, which uses the weight of ``neurons``, compute with them."""
    state = _state(module)
    state.computed.append(neurons)
    if state.forward is None:
        module.forward = types.MethodType(_forward, module)
        state.forward = forward


def _restore_forward(module: nn.Module, neurons: AttachedNeurons) -> None:
    state = _state(module)
    if neurons in state.computed:
        state.computed.remove(neurons)
    if state.forward is not None and not state.computed:
        state.forward = None
        del module.forward
    _drop_empty_state(module)


def _state(module: nn.Module) -> _ModuleState:
    state: _ModuleState = module.__dict__.setdefault(_KEY, _ModuleState())
    return state


def _drop_empty_state(module: nn.Module) -> None:
    if not neurons_in(module):
        module.__dict__.pop(_KEY, None)


def _forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward pass of a module with neurons: it takes one tensor, whatever its name is."""
    (x,) = (*args, *kwargs.values())
    state: _ModuleState = self._neurons
    if not torch.compiler.is_compiling():
        for neurons in state.computed:
            neurons.refresh()
    assert state.forward is not None  # set together with this forward
    return state.forward.run(self, LayerNeurons.of(state.computed, state.forward.in_place), x)


def update_extra_repr(model: nn.Module) -> None:
    """Have ``print(model)`` show the neurons attached now; with none it is as before.

    ``Linear(in_features=16, out_features=24, bias=False, weight_neurons=4 of 24 (trainable, scatter))``:
    the note is part of the module's ``extra_repr``, replaced on the instance. A class that prints itself
    without it, such as transformers' ``Conv1D``, has its note on its parent.
    """
    module: Any  # torch has no type for an instance's method
    for module in model.modules():
        replaced = module.__dict__.get("extra_repr")
        if replaced is None and _notes(module):
            module.extra_repr = types.MethodType(_extra_repr, module)
        elif getattr(replaced, "__func__", None) is _extra_repr and not _notes(module):
            del module.extra_repr


def _extra_repr(self: Any) -> str:
    return ", ".join(part for part in (type(self).extra_repr(self), *_notes(self)) if part)


def _notes(module: nn.Module) -> list[str]:
    notes = [repr(neurons) for neurons in neurons_in(module)] if _uses_extra_repr(module) else []
    for name, child in module.named_children():
        if not _uses_extra_repr(child):
            notes += [f"{name}.{neurons!r}" for neurons in neurons_in(child)]
    return notes


def _uses_extra_repr(module: nn.Module) -> bool:
    return type(module).__repr__ is nn.Module.__repr__
