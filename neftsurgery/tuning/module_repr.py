"""What ``print(model)`` shows of attached neurons.

``Linear(in_features=16, out_features=24, bias=False, weight_neurons=4 of 24 (trainable, scatter))``

The note is part of the module's ``extra_repr``, replaced on the instance. A class that prints itself without
``extra_repr``, such as transformers' ``Conv1D``, has its note on its parent.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from .install import neurons_in

__all__ = ["update_extra_repr"]


def update_extra_repr(model: nn.Module) -> None:
    """Have ``print(model)`` show the neurons attached now; with none it is as before."""
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
