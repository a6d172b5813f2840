"""A module of a model, run alone: as a small copy with random weights, some of them changed."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["Trial", "layers_of", "sizes_of"]

_SHAPE = (3, 4)  # either may be the tokens
_MOST_LAYERS, _MOST_ELEMENTS = 12, 2_000_000  # of a module that is tried: more is a whole model


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers in a module, if it is of a size to be tried."""
    layers = {name: layer for name, layer in module.named_modules() if name and sizes_of(layer)}
    small = (
        2 <= len(layers) <= _MOST_LAYERS and sum(one.numel() for one in module.parameters()) <= _MOST_ELEMENTS
    )
    return layers if small else {}


class Trial:
    """A small copy of a module that can be run."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in self.module.parameters():
                value.copy_(torch.randn(value.shape, generator=draw) * value.shape[-1] ** -0.5)
            for value in self.module.buffers():
                value.zero_()
        self.input = torch.randn(*_SHAPE, width, generator=draw, dtype=torch.float64)
        forward = inspect.signature(self.module.forward).parameters
        self.names = set(forward)
        needed = [
            one.name
            for one in forward.values()
            if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
        ]
        self.given: dict[str, Any] = {
            name: self.input if re.search("residual|input_tensor", name) else None for name in needed[1:]
        }
        self.rotated: list[int] = []

    def run(self) -> Any:
        """What comes out. Raises whatever the module does."""
        with torch.no_grad():
            out = self.module(self.input.clone(), **self.given)
        out = out[0] if isinstance(out, tuple | list) else out
        if not bool(torch.isfinite(out).all()):
            raise ValueError("not finite")
        return out

    def edited(self, *edits: tuple[str, Sequence[int], bool, Callable[[Any], Any]]) -> Any:
        """What comes out with some rows (or columns) of layers, and their biases, changed."""
        kept = {name: value.clone() for name, value in self.module.state_dict().items()}
        with torch.no_grad():
            for layer, index, column, change in edits:
                owner = self.module.get_submodule(layer)
                axis = int(column) ^ int(isinstance(owner, Conv1D))
                where = torch.tensor(index)
                owner.weight.index_copy_(axis, where, change(owner.weight.index_select(axis, where)))
                if not column and owner.bias is not None:
                    owner.bias[where] = change(owner.bias[where])
        try:
            return self.run()
        finally:
            self.module.load_state_dict(kept)
