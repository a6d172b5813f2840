"""Autograd functions of a frozen weight that holds some trainable vectors. Pure: tensors in, tensors out.

In all of them the forward pass computes with the whole weight ``W``, which already holds the
trainable vectors, and never looks at ``rows``; the backward pass gives the input's gradient from the
whole weight, and the gradient of ``rows`` alone. What is saved for it is the weight (by reference),
and what the rows need of the input: all of it for outputs, only the chosen features for inputs.

``rows`` is ``[k, width]`` of any float type, ``index`` int64 ``[k]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["HeldBias", "HeldConvolution", "HeldEmbedding", "HeldInputs", "HeldOutputs", "apply", "matmul"]

# The forward pass may run under autocast, the backward pass does not: the output's type is the one
# that was computed in, and what is saved takes it, as torch's own functions do.


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``x @ W.T + bias`` for ``W [out, in]``, or ``x @ W + bias`` for a transposed ``W [in, out]``.

    Each by the very operation of `torch.nn.Linear` and of transformers' ``Conv1D``: equal to the bit.
    """
    if not transposed:
        return functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """Call one of the functions below."""
    out: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def _input_gradient(grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    weight = weight.to(grad.dtype)
    return grad @ weight.t() if transposed else grad @ weight


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class HeldOutputs(Function):
    """Output units of a linear map: ``rows [k, in]`` are rows of ``W [out, in]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        transposed: bool,
    ) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out = matmul(x, weight, bias, transposed)
        ctx.save_for_backward(
            x.to(out.dtype) if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
            index,
        )
        ctx.transposed, ctx.rows_dtype = transposed, rows.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``rows`` and ``bias``."""
        x, weight, index = ctx.saved_tensors
        of_x = of_rows = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(grad, weight, ctx.transposed)
        if ctx.needs_input_grad[1]:
            chosen = _flat(grad).index_select(1, index)
            of_rows = (chosen.t() @ _flat(x)).to(ctx.rows_dtype)
        if ctx.needs_input_grad[3]:
            of_bias = _flat(grad).sum(0)
        return of_x, of_rows, None, of_bias, None, None


class HeldInputs(Function):
    """Input features of a linear map: ``rows [k, out]`` are columns of ``W [out, in]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        transposed: bool,
    ) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out = matmul(x, weight, bias, transposed)
        ctx.save_for_backward(
            _flat(x).index_select(1, index).to(out.dtype) if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.transposed, ctx.rows_dtype = transposed, rows.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``rows`` and ``bias``."""
        chosen, weight = ctx.saved_tensors
        of_x = of_rows = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _input_gradient(grad, weight, ctx.transposed)
        if ctx.needs_input_grad[1]:
            of_rows = (chosen.t() @ _flat(grad)).to(ctx.rows_dtype)
        if ctx.needs_input_grad[3]:
            of_bias = _flat(grad).sum(0)
        return of_x, of_rows, None, of_bias, None, None


Sizes = tuple[int, ...]


class HeldConvolution(Function):
    """Output channels of a convolution: ``rows [k, in / groups * kernel]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        groups: int,
    ) -> Tensor:
        """``[batch, in, ...]`` to ``[batch, out, ...]``."""
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
        out: Tensor = convolve(x, weight, bias, stride, padding, dilation, groups)
        ctx.save_for_backward(x.to(out.dtype), weight, index)
        ctx.geometry = (list(stride), list(padding), list(dilation), False, [0] * len(stride), groups)
        ctx.rows_dtype = rows.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``rows`` and ``bias``."""
        x, weight, index = ctx.saved_tensors
        weight, groups = weight.to(grad.dtype), ctx.geometry[-1]
        differentiate = torch.ops.aten.convolution_backward
        of_x = of_rows = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = differentiate(grad, x, weight, None, *ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            if groups == 1:
                chosen = grad.index_select(1, index)
                of_rows = differentiate(
                    chosen, x, weight[: len(index)], None, *ctx.geometry, [False, True, False]
                )[1]
            else:  # a chosen channel sees its own group's input only: such weights are small, take them whole
                whole = differentiate(grad, x, weight, None, *ctx.geometry, [False, True, False])[1]
                of_rows = whole.index_select(0, index)
            of_rows = of_rows.flatten(1).to(ctx.rows_dtype)
        if ctx.needs_input_grad[3]:
            of_bias = grad.sum([axis for axis in range(grad.dim()) if axis != 1])
        return of_x, of_rows, None, of_bias, None, None, None, None, None


class HeldEmbedding(Function):
    """Entries of an embedding: ``rows [k, width]``; ``slots`` int64 ``[entries]`` says which, or k."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, rows: Tensor, weight: Tensor, slots: Tensor, padding: int | None
    ) -> Tensor:
        """``[...]`` to ``[..., width]``."""
        ctx.save_for_backward(ids, slots)
        ctx.count, ctx.rows_dtype, ctx.padding = rows.shape[0], rows.dtype, padding
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``rows``."""
        ids, slots = ctx.saved_tensors
        slot = slots[ids]
        if ctx.padding is not None:  # its entry gets no gradient
            slot = slot.masked_fill(ids == ctx.padding, ctx.count)
        flat = _flat(grad).to(ctx.rows_dtype)
        # What is not chosen adds up in one more row: that needs no sizes that depend on the ids.
        sums = flat.new_zeros(ctx.count + 1, flat.shape[1])
        sums.index_add_(0, slot.flatten(), flat)
        return None, sums[: ctx.count], None, None, None


class HeldBias(Function):
    """Elements of a bias: ``rows [k, 1]``. Gives the bias itself, which holds them."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """``[out]``, unchanged."""
        ctx.save_for_backward(index)
        ctx.rows_dtype = rows.dtype
        return bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``rows``."""
        (index,) = ctx.saved_tensors
        return None, grad.index_select(0, index).unsqueeze(1).to(ctx.rows_dtype), None
