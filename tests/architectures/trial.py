"""A module of a model, run alone: a copy with random weights, some of them changed or swapped.

It gets what it was called with when the whole model ran (`calls`), or else random hidden states alone.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .calls import Call

__all__ = ["Move", "Trial", "alike", "axis_of", "layers_of", "sizes_of"]

_SHAPE = (3, 4)  # either may be the tokens
_SIZES = ((3, 20_000_000), (12, 6_000_000))
"""Most layers, and most elements, of a module that is tried: more is a whole model."""

_MOST_CARRIERS = 9
_CLOSE = 1e-4  # of what a wrong swap changes

Move = tuple[str, int, Sequence[tuple[int, int]]]
"""The name of a tensor, an axis, and which positions on it change places."""


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


def axis_of(layer: nn.Module, *, column: bool) -> int:
    """The axis of a layer's weight along which its outputs lie, or its inputs (``column``)."""
    return int(column) ^ int(isinstance(layer, Conv1D))


def alike(module: nn.Module, call: Call | None) -> tuple[Any, ...]:
    """What modules that need not be tried twice have in common."""
    given = _tensors({"": call.args, **call.kwargs}) if call else ()
    tensors = chain(module.named_parameters(), given)
    return type(module), *((name, tuple(one.shape)) for name, one in tensors)


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers in a module, if it is of a size to be tried."""
    layers = {name: layer for name, layer in module.named_modules() if name and sizes_of(layer)}
    elements = sum(one.numel() for one in module.parameters())
    small = any(2 <= len(layers) <= most and elements <= size for most, size in _SIZES)
    return layers if small else {}


class Trial:
    """A copy of a module that can be run."""

    def __init__(self, module: nn.Module, width: int, call: Call | None = None) -> None:
        self.module = copy.deepcopy(call.module) if call else copy.deepcopy(module).to_empty(device="cpu")
        self.module.double().eval()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in self.module.parameters():
                value.copy_(torch.randn(value.shape, generator=draw) * value.shape[-1] ** -0.5)
            for value in () if call else self.module.buffers():
                value.zero_()
        self.width = width
        forward = inspect.signature(self.module.forward).parameters
        self.names = set(forward)
        self.given: dict[str, Any] = {}
        self.rotated: list[int] = []
        if call:
            named = inspect.signature(self.module.forward).bind(*call.args, **call.kwargs).arguments
            for name, value in named.items():
                if forward[name].kind is inspect.Parameter.VAR_KEYWORD:
                    self.given |= value
                else:
                    self.given[name] = value
            self.given = {name: _doubled(value) for name, value in self.given.items()}
        else:
            states = torch.randn(*_SHAPE, width, generator=draw, dtype=torch.float64)
            needed = [
                one.name
                for one in forward.values()
                if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
            ]
            for name in needed:
                wanted = name == needed[0] or re.search("residual|input_tensor", name)
                self.given[name] = states if wanted else None

    @classmethod
    def of(cls, module: nn.Module, width: int, call: Call | None) -> Iterator[Any]:
        """The trials that can be made of a module and run, the most telling first."""
        for given in (call, None) if call else (None,):
            try:
                trial = cls(module, width, given)
                trial.run()
            except Exception:  # it cannot be run so
                continue
            yield trial

    def run(self) -> Any:
        """What comes out. Raises whatever the module does."""
        with torch.no_grad():
            out = self.module(**_doubled(self.given))
        while not isinstance(out, torch.Tensor):
            out = next(one for one in (out.values() if isinstance(out, Mapping) else out) if one is not None)
        if not bool(torch.isfinite(out).all()):
            raise ValueError("not finite")
        return out

    def edited(self, *edits: tuple[str, Sequence[int], bool, Callable[[Any], Any]]) -> Any:
        """What comes out with some rows (or columns) of layers, and their biases, changed."""
        owners = [self.module.get_submodule(layer) for layer, *_ in edits]
        touched = [one for owner in owners for one in owner.parameters(recurse=False)]
        kept = [one.detach().clone() for one in touched]
        with torch.no_grad():
            try:
                for owner, (_, index, column, change) in zip(owners, edits, strict=True):
                    axis, where = axis_of(owner, column=column), torch.tensor(index)
                    owner.weight.index_copy_(axis, where, change(owner.weight.index_select(axis, where)))
                    if not column and owner.bias is not None:
                        owner.bias[where] = change(owner.bias[where])
                return self.run()
            finally:
                for one, value in zip(touched, kept, strict=True):
                    one.copy_(value)

    def moves(self, layer: str, pairs: Sequence[tuple[int, int]], *, column: bool = False) -> list[Move]:
        """What swaps rows (or columns) of a layer, with their biases."""
        owner = self.module.get_submodule(layer)
        found: list[Move] = [(f"{layer}.weight", axis_of(owner, column=column), pairs)]
        return found if column or owner.bias is None else [*found, (f"{layer}.bias", 0, pairs)]

    def swapped(self, moves: Sequence[Move]) -> Any:
        """What comes out with parts of parameters, buffers or arguments in each other's place."""
        held = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        inputs, given = dict(_tensors(self.given)), self.given
        kept: list[tuple[Any, Any]] = []
        try:
            with torch.no_grad():
                for name, axis, pairs in moves:
                    tensor = inputs[name] if name in inputs else held[name]
                    kept.append((tensor, tensor.clone()))
                    order = torch.arange(tensor.shape[axis])
                    for one, other in pairs:
                        order[[one, other]] = order[[other, one]]
                    tensor.copy_(tensor.index_select(axis, order))
            return self.run()
        finally:
            self.given = given
            with torch.no_grad():
                for tensor, value in reversed(kept):
                    tensor.copy_(value)

    def tied_by(self, moves: Sequence[Move], pairs_of: Mapping[int, Sequence[tuple[int, int]]]) -> str | None:
        """What ties two units to their places: "" if a swap changes nothing, None if nothing explains it.

        ``moves`` swap the units; the last of them are columns. ``pairs_of`` are the positions of both on an
        axis of a certain size: other tensors that have one may hold something of each unit.
        """
        base = self.run()
        allowed = _CLOSE * (self.swapped(moves[:-1]) - base).abs().max()
        if not bool(allowed > 0):
            return None

        def exact(extra: Sequence[Move]) -> bool:
            return bool((self.swapped([*moves, *extra]) - base).abs().max() <= allowed)

        if exact(()):
            return ""
        moved = {name for name, *_ in moves}
        carriers: dict[str, list[Move]] = {}
        tensors = chain(self.module.named_parameters(), self.module.named_buffers(), _tensors(self.given))
        for name, tensor in tensors:
            if name in moved:
                continue
            owner = re.sub(r"\.(weight|bias)$", "", name)
            for axis, size in enumerate(tensor.shape):
                if size in pairs_of:
                    carriers.setdefault(f"{owner} {axis}", []).append((name, axis, pairs_of[size]))
        tried = sorted(carriers)
        for count in (1, 2, 3):
            for chosen in combinations(tried[: _MOST_CARRIERS * 2 // count], count):
                try:
                    if exact([move for key in chosen for move in carriers[key]]):
                        return " ".join(sorted({key.partition(" ")[0] for key in chosen}))
                except Exception:
                    continue
        return None


def _doubled(value: Any) -> Any:
    """A copy, its floats in double precision."""
    if isinstance(value, torch.Tensor):
        return value.clone().double() if value.dtype.is_floating_point else value.clone()
    if type(value) in (tuple, list):
        return type(value)(_doubled(one) for one in value)
    return {key: _doubled(one) for key, one in value.items()} if type(value) is dict else value


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors among the arguments of a call, by the names of the arguments."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif type(value) in (tuple, list):
        for index, one in enumerate(value):
            yield from _tensors(one, f"{name} {index}")
    elif type(value) is dict:
        for key, one in value.items():
            yield from _tensors(one, f"{name} {key}" if name else str(key))
