"""Stacked linear weights ``[E, a, b]`` with trainable rows: gradients of the rows alone, by expert.

As in `frozen_weights`, no forward pass reads ``rows``. A backward pass does nothing for experts without
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..neurons.layout import Layout


class ExpertRows:
    """The trainable rows of a stacked weight, by expert."""

    def __init__(self, rows: Tensor, index: Tensor, layout: Layout) -> None:
        count = layout.shape[layout.axes[1]]  # neurons of an expert
        index, order = index.sort(stable=True)
        firsts = torch.arange(layout.shape[0] + 1, device=index.device) * count
        sizes = torch.searchsorted(index, firsts).diff().tolist()
        self.source = rows
        self.parts: dict[int, Any] = {}  # of the weight that were read, by expert
        # Of each expert: the positions of its rows among all, and their numbers in it.
        self.positions: Sequence[Tensor] = torch.split(order, sizes)
        self.index: Sequence[Tensor] = torch.split(index % count, sizes)
        with torch.enable_grad():
            self.rows: tuple[Tensor, ...] = RowsByExpert.apply(self.source, self.positions)  # type: ignore[no-untyped-call]

    def add(self, out: Tensor, x: Tensor, delta: Tensor, tokens: Iterable[Tensor], into: bool) -> None:
        """Add to ``out`` what ``delta`` makes of ``x``, both ``[tokens, ..]``, for the tokens of each expert.

        ``into``: the neurons are columns of ``out``, or else of ``x``.
        """
        for positions, index, here in zip(self.positions, self.index, tokens, strict=True):
            if not len(index) or not len(here):
                continue
            one, given = delta[positions], x[here]
            if into:
                out[here[:, None], index] += given @ one.t()
            else:
                out.index_add_(0, here, given.index_select(1, index) @ one)

    def gradient(self, x: Tensor, grad: Tensor, ends: Sequence[int], outputs: bool) -> Tensor:
        """That of all rows, of the inputs ``x [tokens, in]`` and the outputs' ``grad``, sorted by expert.

        ``ends``: where each expert's tokens end. ``outputs``: whether neurons are outputs, or else inputs.
        """
        chosen, whole = (grad, x) if outputs else (x, grad)
        of_rows = grad.new_zeros(self.source.shape)
        start = 0
        for positions, index, end in zip(self.positions, self.index, ends, strict=True):
            if len(index) and end > start:
                part = chosen[start:end].index_select(1, index).t() @ whole[start:end]
                of_rows.index_copy_(0, positions, part)
            start = end
        return of_rows.to(self.source.dtype)


class RowsByExpert(Function):
    """The rows of each expert, ``[k, width]``, without values: functions of frozen weights never read them.

    The gradients of all experts become one, once; that of experts without tokens is zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One for each entry of ``positions``."""
        ctx.set_materialize_grads(False)
        ctx.positions, ctx.options = positions, {"dtype": rows.dtype, "device": rows.device}
        ctx.shape = rows.shape
        return tuple(rows.new_empty(()).expand(len(each), rows.shape[1]) for each in positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient of ``rows``."""
        whole = torch.zeros(ctx.shape, **ctx.options)
        for positions, grad in zip(ctx.positions, grads, strict=True):
            if grad is not None:
                whole.index_copy_(0, positions, grad)
        return whole, None


class FrozenExperts(Function):
    """Chosen neurons of stacked linear layers; ``multiply(x, weight)`` is what they compute.

    ``ends``: where each expert's tokens end, once the tokens of ``x [..., in]`` are brought into ``order``.
    ``delta`` is as in `FrozenLinear`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        experts: ExpertRows,
        outputs: bool,
        multiply: Callable[[Tensor, Tensor], Tensor],
        order: Tensor | None,
        ends: Tensor,
        delta: Tensor | None,
    ) -> Tensor:
        """``[..., out]``; the weight is ``[E, in, out]``."""
        out = multiply(x, weight).detach()  # no view for autograd, so that it may be changed in place
        ctx.tokens = None if delta is None else _tokens(order, ends, x)
        if delta is not None:
            out, delta, flat = out.contiguous(), delta.to(out.dtype), x.to(out.dtype).flatten(0, -2)
            with torch.autocast(x.device.type, enabled=False):
                experts.add(out.view(-1, out.shape[-1]), flat, delta, ctx.tokens, outputs)
        kept = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x.to(out.dtype), kept, delta, order, ends)
        ctx.experts, ctx.outputs, ctx.multiply = experts, outputs, multiply
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``rows``."""
        x, weight, delta, order, ends = ctx.saved_tensors
        of_x = of_rows = None
        if ctx.needs_input_grad[0]:
            of_x = ctx.multiply(grad.contiguous(), weight.to(grad.dtype).transpose(-2, -1))
            if delta is not None:
                of_x, flat = of_x.contiguous(), grad.flatten(0, -2)
                ctx.experts.add(of_x.view(-1, of_x.shape[-1]), flat, delta, ctx.tokens, not ctx.outputs)
        if ctx.needs_input_grad[1]:
            x, grad = x.flatten(0, -2), grad.flatten(0, -2)
            if order is not None:
                x, grad = x[order], grad[order]
            of_rows = ctx.experts.gradient(x, grad, ends.tolist(), ctx.outputs)
        return of_x, of_rows, None, None, None, None, None, None, None


def _tokens(order: Tensor | None, ends: Tensor, x: Tensor) -> list[Tensor]:
    """The numbers of each expert's tokens in ``x``."""
    last = [0, *ends.tolist()]
    order = torch.arange(last[-1], device=x.device) if order is None else order
    return [order[start:end] for start, end in pairwise(last)]
