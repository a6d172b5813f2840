"""A weight that carries its neurons, whoever reads it.

While neurons are attached, ``module.weight`` is a `NeuronWeight` that stands before the parameter. Every
torch function gets a plain tensor instead of it: values with the neurons in them, whose gradient goes to the
neurons alone. So it does not matter whether a module reads its own weight, its parent does, or a recurrent
layer keeps a list of weights. The price is a gradient of the whole weight, for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from ..live.weights import read_vectors, write_vectors
from ..neurons.layout import Layout
from .attached_neurons import AttachedNeurons, refuse_pickling
from .frozen_weights import apply_function

__all__ = ["NeuronWeight", "WeightNeurons", "renew_weight"]


class CarriedRows(Function):
    """Values that contain ``rows``, from ``make()``, as if they had been computed from them.

    The backward pass picks the gradient of the rows out of the dense gradient of the values.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout, index: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The values, of the layout's shape; never an argument, so in no function's result is it a view."""
        ctx.layout, ctx.index, ctx.rows_dtype = layout, index, rows.dtype
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``rows``."""
        dense = grad.to_dense() if grad.is_sparse else grad
        return read_vectors(dense, ctx.layout, ctx.index).to(ctx.rows_dtype), None, None, None


@dataclass(frozen=True)
class WeightNeurons:
    """All neurons attached to one live weight, at most one of them trainable."""

    attached: tuple[AttachedNeurons, ...]

    @property
    def stored(self) -> Tensor:
        """The live weight."""
        return self.attached[0].weight

    @property
    def trained(self) -> AttachedNeurons | None:
        """The neurons that get a gradient now."""
        if not torch.is_grad_enabled():
            return None
        return next((neurons for neurons in self.attached if neurons.trainable), None)

    def values(self) -> Tensor:
        """The weight with the values of all neurons in it: itself, or a copy where it is overlaid."""
        for neurons in self.attached:
            neurons.refresh()
        weight = self.stored.detach()
        overlaid = [neurons for neurons in self.attached if neurons.mode == "overlay"]
        if overlaid:
            weight = weight.clone()
            for neurons in overlaid:
                write_vectors(weight, neurons.layout, neurons.index, neurons.rows.detach())
        return weight

    def carried(self) -> Tensor:
        """`values`, through which the trainable neurons get their gradient."""
        neurons = self.trained
        if neurons is None:
            return self.values()
        return apply_function(CarriedRows, neurons.rows, neurons.layout, neurons.index, self.values)


class NeuronWeight(Tensor):
    """What ``module.weight`` is while neurons are attached: the parameter's values, with theirs."""

    neurons: WeightNeurons
    parameter: Tensor  # that it stands for
    _is_param = True  # isinstance(weight, nn.Parameter), as of the parameter that it stands for

    @staticmethod
    def of(neurons: WeightNeurons, rows: Tensor | None, like: Tensor) -> NeuronWeight:
        """It stands for the parameter ``like``; the trainable rows are ``rows``."""

        def make() -> Tensor:
            weight: NeuronWeight = Tensor._make_wrapper_subclass(
                NeuronWeight, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
            )
            weight.neurons, weight.parameter = neurons, like
            return weight

        trained = next((each for each in neurons.attached if each.trainable), None)
        if rows is None or trained is None:
            return make()  # type: ignore[return-value]
        # A function of autograd, so that code which torch does not ask (custom functions, extensions in C++)
        # gives the rows their gradient too.
        with torch.enable_grad():
            weight: Any = apply_function(CarriedRows, rows, trained.layout, trained.index, make)
        return weight  # type: ignore[no-any-return]

    @classmethod
    @_disable_dynamo  # what it traces loses the gradient where a result is a view of the weight
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name == "requires_grad":
            return args[0].neurons.trained is not None
        changed, computed = (args[:1], args[1:]) if _is_in_place(name) or name in _STORED else ((), args)
        stored = tree_map_only(NeuronWeight, lambda weight: weight.neurons.stored, changed)
        more, named = tree_map_only(
            NeuronWeight, lambda weight: weight.neurons.carried(), (computed, kwargs or {})
        )
        return func(*stored, *more, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What comes here without `__torch_function__`; autograd has recorded it already."""
        args, kwargs = tree_map_only(
            NeuronWeight, lambda weight: weight.neurons.values(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("neurons", "parameter"):
            raise AttributeError(name)
        return getattr(self.neurons.stored, name)  # what libraries mark parameters with

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NeuronWeight({self.neurons.carried()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> NeuronWeight:
        twins = WeightNeurons(tuple(copy.deepcopy(list(self.neurons.attached), memo)))
        trained = next((neurons for neurons in self.neurons.attached if neurons.trainable), None)
        rows = None if trained is None else copy.deepcopy(trained.rows, memo)
        memo[id(self)] = twin = NeuronWeight.of(twins, rows, copy.deepcopy(self.parameter, memo))
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


def _is_in_place(name: str) -> bool:
    """Whether the torch function ``name`` changes its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNING


_ASSIGNING = {
    "__set__", "__delete__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"
}  # fmt: skip


# Functions that tell of a weight, or give hold of it, without computing with its values.
_STORED = {
    "__len__", "_version", "data", "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "grad",
    "grad_fn", "is_complex", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_leaf", "is_meta",
    "is_quantized", "is_sparse", "itemsize", "layout", "names", "nbytes", "ndim", "ndimension", "nelement",
    "numel", "retains_grad", "shape", "size", "storage", "storage_offset", "stride", "untyped_storage",
}  # fmt: skip


def renew_weight(uses: Iterable[tuple[nn.Module, str]], attached: Iterable[AttachedNeurons]) -> None:
    """Have all modules that own a weight read the neurons ``attached`` to it; none: the weight itself."""
    neurons, weight = WeightNeurons(tuple(attached)), None
    if neurons.attached:
        rows = next((each.rows for each in neurons.attached if each.trainable), None)
        weight = NeuronWeight.of(neurons, rows, neurons.stored)
    module: Any
    for module, attribute in uses:
        if weight is not None:
            module.__dict__[attribute] = weight
            # FSDP2 then assigns its shards as attributes, which takes the weight away: it knows only its own.
            module.__dict__["__setattr__"] = partial(setattr, module)
        else:
            _restore(module, attribute)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # the list of weights that it computes with


def _restore(module: nn.Module, attribute: str) -> None:
    module.__dict__.pop(attribute, None)
    held = module._parameters[attribute]
    if isinstance(held, NeuronWeight):  # the model's weights were tied while neurons were attached
        module._parameters[attribute] = held.parameter
    if not any(isinstance(value, NeuronWeight) for value in module.__dict__.values()):
        module.__dict__.pop("__setattr__", None)
