"""State dicts of models with attached neurons, and what `save_pretrained` writes of them.

The trainable values are entries of their own, so any tool's checkpoint holds them. A plain model's state sets
them to its vectors. ``save_pretrained`` writes a plain model that computes the same.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import MismatchError, UsageError
from ..live.weights import full_tensor, is_plain, read_vectors, write_vectors
from .attached_neurons import AttachedNeurons

_KEY = "_neurons"  # in the module's __dict__: what is installed in it


def register_state_hooks(module: nn.Module) -> list[RemovableHandle]:
    """Have the state dicts of a module with trainable neurons hold them, and load them."""
    owner: Any = module  # torch has no types for these two
    saving = owner.register_state_dict_pre_hook(_refresh)
    return [saving, owner.register_load_state_dict_pre_hook(_add_missing)]


def _owned(module: nn.Module) -> list[AttachedNeurons]:
    state = module.__dict__.get(_KEY)
    return [] if state is None else state.owned


def _refresh(module: nn.Module, *_: Any) -> None:
    for neurons in _owned(module):
        neurons.refresh()


def _add_missing(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the values that ``state`` lacks: those of its weight. That of other neurons is refused."""
    for neurons in _owned(module):
        weight = prefix + neurons.attribute
        if not neurons.trainable or prefix + neurons.parameter_name in state:
            continue
        if any(key.startswith(f"{weight}_neurons_") for key in state):
            raise MismatchError(
                "the state holds values of other neurons of this weight",
                tensor=neurons.name,
                hint="attach the selection that the state was saved with",
            )
        if weight in state and is_plain(state[weight]) and state[weight].shape == neurons.layout.shape:
            index = neurons.index.to(state[weight].device)
            state[prefix + neurons.parameter_name] = read_vectors(state[weight], neurons.layout, index)


def patch_saving(model: nn.Module) -> None:
    """Have ``save_pretrained`` of the model's modules write plain models; without neurons, as before."""
    attached = any(_owned(module) for module in model.modules())
    for module in model.modules():
        replaced = module.__dict__.get("save_pretrained")
        if replaced is None and attached and callable(getattr(module, "save_pretrained", None)):
            module.save_pretrained = types.MethodType(_save_pretrained, module)  # type: ignore[assignment]
        elif getattr(replaced, "__func__", None) is _save_pretrained and not attached:
            del module.save_pretrained


def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = _plain_state(self, kwargs["state_dict"])
    self.state_dict = lambda *given, **named: _plain_state(self, type(self).state_dict(self, *given, **named))
    try:
        return type(self).save_pretrained(self, *args, **kwargs)
    finally:
        del self.state_dict


def _plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a plain model that computes as ``model``, whose state is ``state``."""
    plain = dict(state)
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for neurons in _owned(module):
            rows = plain.pop(prefix + neurons.parameter_name, None)
            weight = plain.get(prefix + neurons.attribute)
            if neurons.mode != "overlay" or neurons.disabled or weight is None:
                continue
            if not is_plain(weight):
                raise UsageError(
                    "the weight is quantized or sharded, so it cannot be saved with its neurons",
                    tensor=neurons.name,
                    hint="save attached.patch(path), or the adapter of a NeftConfig",
                )
            rows = full_tensor(neurons.rows.detach()) if rows is None else rows
            patched, device = weight.detach().clone(), weight.device
            write_vectors(patched, neurons.layout, neurons.index.to(device), rows.to(device))
            for key, other in state.items():  # also of tied weights
                if isinstance(other, Tensor) and other.data_ptr() == weight.data_ptr() and key in plain:
                    plain[key] = patched if other.shape == weight.shape else other
    return plain
