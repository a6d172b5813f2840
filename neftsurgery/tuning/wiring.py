"""Neurons put to work in a module, and taken out without a trace.

A module keeps its class, its name, its weights and its hooks; only the ``forward`` of the instance is
set. Trainable values are a parameter of the module (``weight_neurons`` beside ``weight``), so that
whatever looks for parameters finds them: optimizers, the Trainer, DDP, FSDP. State dicts leave them
out, so that ``save_pretrained`` writes, and ``load_state_dict`` expects, the model's own tensors only.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .neurons import Neurons, refuse_pickling
from .operations import Operation, Parts

__all__ = ["has_own_forward", "is_training", "neurons_at", "settle", "unsettle", "unwire", "wire"]

_KEY = "_neurons"  # in the module's __dict__


class _Wiring:
    """What is at one module.

    Attributes
    ----------
    settled:
        Neurons of the weights it owns.
    operation, parts:
        How it computes with which neurons; None if its forward pass is its own.
    handles:
        Of its state-dict hooks, while it owns trainable values.
    """

    def __init__(self) -> None:
        self.settled: list[Neurons] = []
        self.operation: Operation | None = None
        self.parts = Parts()
        self.handles: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wiring:
        twin = _Wiring()
        memo[id(self)] = twin
        twin.settled = copy.deepcopy(self.settled, memo)
        twin.operation, twin.parts = self.operation, copy.deepcopy(self.parts, memo)
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def neurons_at(module: nn.Module, attribute: str) -> list[Neurons]:
    """Those that are in force in the weight ``attribute``, which ``module`` owns."""
    wiring = module.__dict__.get(_KEY)
    return [] if wiring is None else [n for n in wiring.settled if n.attribute == attribute]


def is_training(model: nn.Module) -> bool:
    """Whether some neurons of the model are trainable."""
    wirings = (module.__dict__.get(_KEY) for module in model.modules())
    return any(neurons.trainable for wiring in wirings if wiring is not None for neurons in wiring.settled)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody else (accelerate's offloading, for one) has set the forward of this instance."""
    wiring = module.__dict__.get(_KEY)
    return "forward" in module.__dict__ and (wiring is None or wiring.operation is None)


def settle(neurons: Neurons, values: Tensor | None) -> None:
    """Put ``values`` in force in the weight; see `Neurons.install`."""
    neurons.install(values)
    wiring = _wiring(neurons.module)
    wiring.settled.append(neurons)
    if neurons.trainable and not wiring.handles:
        module: Any = neurons.module  # torch has no types for these two
        wiring.handles = [
            module.register_state_dict_post_hook(_leave_out),
            module.register_load_state_dict_post_hook(_do_not_miss),
        ]


def unsettle(neurons: Neurons) -> None:
    """The inverse of `settle`."""
    neurons.remove()
    wiring: _Wiring = neurons.module.__dict__[_KEY]
    wiring.settled.remove(neurons)
    if not any(other.trainable for other in wiring.settled):
        for handle in wiring.handles:
            handle.remove()
        wiring.handles = []
    _clear(neurons.module)


def wire(module: nn.Module, neurons: Neurons, operation: Operation) -> None:
    """Have the forward pass of ``module``, which uses the weight of ``neurons``, compute with them."""
    wiring = _wiring(module)
    wiring.parts.of(neurons).append(neurons)
    if operation.looks_up:
        neurons.make_slots()
    if wiring.operation is None:
        wiring.operation = operation
        module.forward = types.MethodType(_forward, module)


def unwire(module: nn.Module, neurons: Neurons) -> None:
    """The inverse of `wire`."""
    wiring: _Wiring = module.__dict__[_KEY]
    wiring.parts.of(neurons).remove(neurons)
    if not wiring.parts.all:
        wiring.operation = None
        del module.forward
    _clear(module)


def _wiring(module: nn.Module) -> _Wiring:
    wiring: _Wiring = module.__dict__.setdefault(_KEY, _Wiring())
    return wiring


def _clear(module: nn.Module) -> None:
    wiring: _Wiring = module.__dict__[_KEY]
    if not wiring.settled and not wiring.parts.all:
        del module.__dict__[_KEY]


def _forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward pass of a wired module: of one tensor, whatever its name is."""
    (x,) = (*args, *kwargs.values())
    wiring: _Wiring = self._neurons
    parts = wiring.parts
    if not torch.compiler.is_compiling():
        # A compiled graph writes no weights: there the hook after the optimizer's step does, or `refresh`.
        for neurons in parts.all:
            neurons.refresh()
    assert wiring.operation is not None  # it is what sets this forward
    return wiring.operation.run(self, parts, x)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for neurons in module.__dict__[_KEY].settled:
        state.pop(prefix + neurons.parameter_name, None)


def _do_not_miss(module: nn.Module, incompatible: Any) -> None:
    ours = {neurons.parameter_name for neurons in module.__dict__[_KEY].settled}
    missing: list[str] = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rpartition(".")[2] not in ours]
