"""Linear weights that a model multiplies by itself, alone or stacked: no gradient of the whole weight.

Models with experts hold the weights of all in one parameter, ``[E, out, in]`` or ``[E, in, out]``. They read
one expert at a time (``weight[e]``) or one for each token (``weight[ids]``), or multiply tokens sorted by
expert with the whole stack. These reads give parts that still carry the neurons, and the products give the
gradient of the chosen rows alone. Anything else that is done with a part goes the way of `neuron_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..live.weights import read_vectors, write_vectors
from ..neurons.layout import Layout
from .attached_neurons import AttachedNeurons
from .expert_weights import ExpertRows, FrozenExperts
from .frozen_weights import FrozenLinear, apply_function
from .neuron_weight import CarriedRows, NeuronWeight, WeightNeurons


@dataclass(frozen=True, eq=False)
class LinearNeurons(WeightNeurons):
    """One trainable set of neurons of a linear weight, or of a stack; or of a part that was read."""

    expert: int | Tensor | None = None
    transposed: bool = False
    experts: tuple[ExpertRows, ...] = ()  # of a stack that one expert was read of

    @classmethod
    def fits(cls, attached: Sequence[AttachedNeurons]) -> bool:
        """Whether the neurons are one set that this class covers."""
        (first, *others) = attached
        two = len(first.layout.shape) == 2 and len(first.layout.axes) == 1
        return not others and first.trainable and (two or _is_stack(first.layout))

    @property
    def stored(self) -> Tensor:
        """The part of the live weight."""
        return self._part(self.attached[0].weight)

    def _part(self, weight: Tensor) -> Tensor:
        part = weight if self.expert is None else weight[self.expert]
        return part.transpose(-2, -1) if self.transposed else part

    @cached_property
    def layout(self) -> Layout:
        """Where the neurons lie in the part; of one expert for each token, where they lie in the stack."""
        shape, axes = self.attached[0].layout.shape, self.attached[0].layout.axes
        if isinstance(self.expert, int):
            shape, axes = shape[1:], (axes[1] - 1,)
        if self.transposed:
            *rest, a, b = shape
            shape, axes = (*rest, b, a), (*axes[:-1], 2 * len(rest) + 1 - axes[-1])
        return Layout.of(shape, axes)

    @property
    def rows(self) -> Tensor:
        """The trainable rows of the part."""
        return self.experts[0].rows[self.expert] if isinstance(self.expert, int) else self.attached[0].rows

    @property
    def index(self) -> Tensor:
        """The numbers of `rows` in `layout`."""
        return self.experts[0].index[self.expert] if isinstance(self.expert, int) else self.attached[0].index

    def values(self) -> Tensor:
        """The part with the values of its neurons in it."""
        if not isinstance(self.expert, int):
            return self._part(super().values())
        part = self.frozen()
        if self.overlaid:
            part = part.clone()
            rows, _ = self._chosen()
            write_vectors(part, self.layout, self.index, rows)
        return part

    def _chosen(self) -> tuple[Tensor, Tensor]:
        """The values of the part's rows, and their numbers in the weight."""
        (neurons,) = self.attached
        rows, index = neurons.rows.detach(), neurons.index
        if isinstance(self.expert, int):
            positions = self.experts[0].positions[self.expert]
            return rows[positions], index[positions]
        return rows, index

    def difference(self) -> Tensor | None:
        """What the rows add to the vectors in the weight, ``[k, width]``; None if it holds the rows."""
        if not self.overlaid:
            return None
        rows, index = self._chosen()
        held = read_vectors(self.attached[0].weight.detach(), self.attached[0].layout, index)
        return rows - held.to(rows.dtype)

    def frozen(self) -> Tensor:
        """The part of the live weight, which has the neurons' values unless they are `overlaid`."""
        for neurons in self.attached:
            neurons.refresh()
        return self._part(self.attached[0].weight.detach())

    def carried(self) -> Tensor:
        """`values`, through which the neurons get their gradient."""
        if self.trainable is None or not torch.is_grad_enabled():
            return self.values()
        return apply_function(CarriedRows, self.rows, self.layout, self.index, self._ids, self.values)

    @property
    def _ids(self) -> Tensor | None:
        """The experts, if there is one for each token."""
        return self.expert if isinstance(self.expert, Tensor) else None

    @property
    def count(self) -> int:
        """The experts of a stack, or the tokens that have one each."""
        return self.layout.shape[0] if self._ids is None else len(self._ids)

    def compute(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a function that reads a part, or of a product."""
        if self.trainable is None:
            return NotImplemented
        first, *more = args or (None,)
        if isinstance(first, NeuronWeight) and first.neurons is self:
            if name == "__getitem__":
                return self._read(more[0])
            if name in ("t", "T", "mT") or (name == "transpose" and self._swaps(*more, **kwargs)):
                return self.part(transposed=not self.transposed)
        if name == "linear":
            return _linear(*args, **kwargs)
        if name in ("matmul", "__matmul__", "mm", "bmm") and len(args) == 2 and not kwargs:
            return _multiplied(*args)
        given = [key for key, value in kwargs.items() if value is not None]
        if name in ("_grouped_mm", "grouped_mm_fallback") and len(args) == 2 and given == ["offs"]:
            return _grouped(func, args[0], args[1], kwargs["offs"])
        return NotImplemented

    def _swaps(self, *axes: int) -> bool:
        count = len(self.layout.shape)
        return sorted(axis % count for axis in axes) == [count - 2, count - 1]

    def _read(self, expert: Any) -> Any:
        """The part of one expert, or of one for each token; NotImplemented for any other index."""
        if self.expert is not None or self.transposed or not _is_stack(self.layout):
            return NotImplemented
        if isinstance(expert, Tensor) and expert.dtype in (torch.int64, torch.int32):
            if expert.dim() == 1:
                return self.part(expert=expert)
            expert = int(expert) if expert.dim() == 0 else None
        if type(expert) is not int or not 0 <= expert < self.layout.shape[0]:
            return NotImplemented
        parts = self.by_expert.parts
        if expert not in parts:
            parts[expert] = self.part(expert=expert, experts=(self.by_expert,))
        return parts[expert]

    def part(self, **changes: Any) -> NeuronWeight:
        """A part of this part."""
        part = replace(self, **changes)
        parameter = self.attached[0].weight
        with torch.inference_mode(False):  # parts are kept
            return NeuronWeight.of(part, parameter, part.rows, part.layout, part.index, part._ids)

    @property
    def by_expert(self) -> ExpertRows:
        """The rows of each expert."""
        (neurons,) = self.attached
        if neurons.by_expert is None:
            with torch.inference_mode(False):  # training uses it, too
                neurons.by_expert = ExpertRows(neurons.rows, neurons.index, neurons.layout)
        found: ExpertRows = neurons.by_expert
        return found

    def times(self, x: Tensor) -> Tensor:
        """``x @ part`` of a part ``[in, out]``."""
        inputs = self.layout.axes == (0,)
        return self._product(x, None, True, inputs)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ part.T + bias`` of a part ``[out, in]``."""
        inputs = self.layout.axes == (1,)
        return self._product(x, bias, False, inputs)

    def _product(self, x: Tensor, bias: Tensor | None, transposed: bool, inputs: bool) -> Tensor:
        arguments = (x, self.rows, self.frozen(), bias, self.index, transposed, inputs, self.difference())
        return apply_function(FrozenLinear, *arguments)

    def times_each(
        self, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor], ends: Tensor | None = None
    ) -> Tensor:
        """``multiply(x, stack)`` of a part ``[E, in, out]``; of one expert for each token, that of the stack.

        ``ends``: where each expert's tokens end in ``x``; None: ``x [E, tokens, in]``, or one for each token.
        """
        order, count, ids = None, self.attached[0].layout.shape[0], self._ids
        if ids is not None:
            places = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[0], -1)
            order = places[ids.argsort(stable=True)].flatten()
            ends = ids.bincount(minlength=count).cumsum(0) * x.shape[1]
        elif ends is None:
            ends = torch.arange(1, count + 1) * x.shape[1]
        weight = replace(self, expert=None).frozen()
        arguments = (x, self.rows, weight, self.by_expert, self.layout.axes[1] == 2, multiply, order, ends)
        return apply_function(FrozenExperts, *arguments, self.difference())


def _is_stack(layout: Layout) -> bool:
    return len(layout.shape) == 3 and layout.axes in ((0, 1), (0, 2))


def _part_of(weight: Any, *, dim: int) -> LinearNeurons | None:
    """The neurons of a weight or part of ``dim`` dimensions."""
    part = weight.neurons if isinstance(weight, NeuronWeight) else None
    return part if isinstance(part, LinearNeurons) and len(part.layout.shape) == dim else None


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    part = _part_of(weight, dim=2)
    if part is None or isinstance(input, NeuronWeight):
        return NotImplemented
    bias = bias.neurons.carried() if isinstance(bias, NeuronWeight) else bias
    return part.linear(input, bias)


def _multiplied(left: Any, right: Any) -> Any:
    if isinstance(left, NeuronWeight) and isinstance(right, NeuronWeight):
        return NotImplemented
    if (part := _part_of(right, dim=2)) is not None:
        return part.times(left)
    if (part := _part_of(right, dim=3)) is not None and left.shape[:-2] == (part.count,):
        ids = part._ids
        return part.times_each(left, lambda x, stack: torch.bmm(x, stack if ids is None else stack[ids]))
    if (part := _part_of(left, dim=3)) is not None and right.shape[:-2] == (part.count,):
        ids = part._ids

        def multiply(x: Tensor, stack: Tensor) -> Tensor:  # the same product, of the other side
            return torch.bmm((stack if ids is None else stack[ids]).mT, x.mT).mT

        return replace(part, transposed=not part.transposed).times_each(right.mT, multiply).mT
    return NotImplemented


def _grouped(func: Any, input: Any, weight: Any, offs: Tensor) -> Any:
    part = _part_of(weight, dim=3)
    if part is None or part.expert is not None or isinstance(input, NeuronWeight):
        return NotImplemented
    return part.times_each(input, lambda x, stack: func(x, stack, offs=offs), offs)
