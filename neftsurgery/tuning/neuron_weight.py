"""A weight that carries its neurons, whoever reads it.

While neurons are attached, ``module.weight`` is a `NeuronWeight` that stands before the parameter. Every
torch function gets a plain tensor instead of it: values with the neurons in them, whose gradient goes to the
neurons alone. So it does not matter whether a module reads its own weight, its parent does, or a recurrent
layer keeps a list of weights. The price is a gradient of the whole weight, for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from ..live.weights import read_vectors, write_vectors
from ..neurons.layout import Layout
from .attached_neurons import AttachedNeurons, refuse_pickling
from .frozen_weights import apply_function


class CarriedRows(Function):
    """Values that contain ``rows``, from ``make()``, as if they had been computed from them.

    The backward pass picks the gradient of the rows out of the dense gradient of the values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        layout: Layout,
        index: Tensor,
        ids: Tensor | None,
        make: Callable[[], Tensor],
    ) -> Tensor:
        """The values, of the layout's shape; of ``ids``, if any, along its first axis. They are no argument,
        so that no function's result is a view of one.
        """
        ctx.layout, ctx.index, ctx.ids, ctx.rows_dtype = layout, index, ids, rows.dtype
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``rows``."""
        dense = grad.to_dense() if grad.is_sparse else grad
        if ctx.ids is not None:
            dense = dense.new_zeros(ctx.layout.shape).index_add(0, ctx.ids, dense)
        return read_vectors(dense, ctx.layout, ctx.index).to(ctx.rows_dtype), None, None, None, None


@dataclass(frozen=True, eq=False)
class WeightNeurons:
    """All neurons attached to one live weight, at most one set of them trainable."""

    attached: tuple[AttachedNeurons, ...]

    @property
    def stored(self) -> Tensor:
        """The live weight."""
        return self.attached[0].weight

    @property
    def trainable(self) -> AttachedNeurons | None:
        """The neurons that are trained."""
        return next((each for each in self.attached if each.trainable and not each.disabled), None)

    @property
    def overlaid(self) -> bool:
        """Whether the live weight lacks values of some neurons."""
        return any(each.mode == "overlay" and not each.disabled for each in self.attached)

    def values(self) -> Tensor:
        """The weight with the values of all neurons in it: itself, or a copy where it is overlaid."""
        for neurons in self.attached:
            neurons.refresh()
        weight = self.attached[0].weight.detach()
        overlaid = [each for each in self.attached if each.mode == "overlay" and not each.disabled]
        if overlaid:
            weight = weight.clone()
            for neurons in overlaid:
                write_vectors(weight, neurons.layout, neurons.index, neurons.rows.detach())
        return weight

    def carried(self) -> Tensor:
        """`values`, through which the trainable neurons get their gradient."""
        neurons = self.trainable
        if all(each.disabled for each in self.attached):
            return self.stored  # which may have a gradient
        if neurons is None or not torch.is_grad_enabled():
            return self.values()
        return apply_function(CarriedRows, neurons.rows, neurons.layout, neurons.index, None, self.values)

    def compute(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of the torch function ``name``, if there is a better way than by `carried`."""
        return NotImplemented


class NeuronWeight(Tensor):
    """What ``module.weight`` is while neurons are attached: the parameter's values, with theirs."""

    neurons: WeightNeurons
    parameter: Tensor  # that it stands for
    _is_param = True  # isinstance(weight, nn.Parameter), as of the parameter that it stands for

    @staticmethod
    def of(
        neurons: WeightNeurons,
        parameter: Tensor,
        rows: Tensor | None,
        layout: Layout,
        index: Tensor,
        ids: Tensor | None = None,
    ) -> NeuronWeight:
        """It stands for ``parameter``, or a part of it. The other arguments are those of `CarriedRows`."""
        size = layout.shape if ids is None else (len(ids), *layout.shape[1:])

        def make() -> Tensor:
            weight: NeuronWeight = Tensor._make_wrapper_subclass(
                NeuronWeight, size, dtype=parameter.dtype, device=parameter.device
            )
            weight.neurons, weight.parameter = neurons, parameter
            return weight

        if rows is None:
            return make()  # type: ignore[return-value]
        # A function of autograd, so that code which torch does not ask (custom functions, extensions in C++)
        # gives the rows their gradient too.
        with torch.enable_grad():
            weight: Any = apply_function(CarriedRows, rows, layout, index, ids, make)
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
            return torch.is_grad_enabled() and args[0].neurons.trainable is not None
        for argument in (*args, *(kwargs or {}).values()):
            if isinstance(argument, NeuronWeight) and (torch.is_grad_enabled() or argument.neurons.overlaid):
                out = argument.neurons.compute(name, func, args, kwargs or {})
                if out is not NotImplemented:
                    return out
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNING
        changed, computed = (args[:1], args[1:]) if in_place or name in _STORED else ((), args)
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
        trained = self.neurons.trainable
        rows = None if trained is None else copy.deepcopy(trained.rows, memo)
        twins = type(self.neurons)(tuple(copy.deepcopy(list(self.neurons.attached), memo)))
        parameter, first = copy.deepcopy(self.parameter, memo), trained or self.neurons.attached[0]
        memo[id(self)] = twin = NeuronWeight.of(twins, parameter, rows, first.layout, first.index)
        return twin

    def __reduce_ex__(self, protocol: object) -> Any:
        refuse_pickling()


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
