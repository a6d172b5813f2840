"""Autograd functions for frozen weights with trainable vectors. Pure: tensors in, tensors out.

The forward pass computes with the whole weight ``W``, which already contains the trainable vectors, and does
not read ``rows``, unless they are overlaid. The backward pass gives the gradient of the input from the whole
weight, and the gradient of ``rows`` alone. It saves the weight by reference, and the part of the input that
the gradient of ``rows`` needs: all of it for outputs, only the chosen features for inputs.

``rows`` is ``[k, width]`` of any float dtype, ``index`` int64 ``[k]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

# The forward pass may run under autocast, the backward pass does not. So tensors are saved in the dtype of
# the output, which is the one computed in, as torch's own functions do.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x @ W.T + bias`` for ``W [out, in]``, or ``x @ W + bias`` for a transposed ``W [in, out]``.

    The operations are those of `torch.nn.Linear` and transformers' ``Conv1D``: results are equal to the bit.
    The result is not a view for autograd, so that it may be changed in place.
    """
    if transposed:
        flat = _flat(x)
        out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    else:
        out = functional.linear(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[transposed])
    return torch.ops.aten._unsafe_view(out, shape)  # type: ignore[no-any-return]


def apply_function(function: type[Function], *arguments: Any) -> Tensor:
    """``function.apply(*arguments)``, typed."""
    out: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class FrozenLinear(Function):
    """Chosen outputs or inputs of a linear layer with ``W [out, in]``.

    ``rows`` are rows of ``W``, ``[k, in]``; with ``inputs`` they are its columns, ``[k, out]``. If the weight
    holds the vectors that they replace, ``delta`` is what they add to these: with zeros the output is the
    layer's, to the bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        transposed: bool,
        inputs: bool,
        delta: Tensor | None = None,
    ) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out = linear(x, weight, bias, transposed)
        kept: Any = None
        if delta is not None or ctx.needs_input_grad[1]:
            kept = (_flat(x).index_select(1, index) if inputs else x).to(out.dtype)
        if delta is not None:
            delta = delta.to(out.dtype)
            if inputs:
                _flat(out).addmm_(kept, delta)
            else:
                _flat(out).index_add_(1, index, _flat(kept) @ delta.t())
        needs_x, needs_rows, *_ = ctx.needs_input_grad
        picks = None if inputs and delta is None else index
        ctx.save_for_backward(kept if needs_rows else None, weight if needs_x else None, delta, picks)
        ctx.transposed, ctx.inputs, ctx.rows_dtype = transposed, inputs, rows.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``rows`` and ``bias``."""
        kept, weight, delta, index = ctx.saved_tensors
        flat = _flat(grad)
        chosen: Any = flat if ctx.inputs else None
        of_x = of_rows = of_bias = None
        if chosen is None and (ctx.needs_input_grad[1] or delta is not None):
            chosen = flat.index_select(1, index)
        if ctx.needs_input_grad[0]:
            weight = weight.to(grad.dtype)
            of_x = grad @ weight.t() if ctx.transposed else grad @ weight
            if delta is not None and ctx.inputs:
                _flat(of_x).index_add_(1, index, flat @ delta.t())
            elif delta is not None:
                _flat(of_x).addmm_(chosen, delta)
        if ctx.needs_input_grad[1]:
            of_rows = (kept.t() @ chosen if ctx.inputs else chosen.t() @ _flat(kept)).to(ctx.rows_dtype)
        if ctx.needs_input_grad[3]:
            of_bias = flat.sum(0)
        return of_x, of_rows, None, of_bias, None, None, None, None
