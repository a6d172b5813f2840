"""What the chosen neurons of a weight are to the module that computes with it.

An operation runs a module's forward pass with the neurons in force. *Held* neurons (scatter mode) are
in the frozen weight already, so they only need their gradients. *Laid over* it (overlay mode), chosen
outputs are computed apart and replaced; chosen inputs are taken out of the base's product, and added
back with their own values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .functions import HeldBias, HeldConvolution, HeldEmbedding, HeldInputs, HeldOutputs, apply, matmul
from .neurons import Mode, Neurons, Side
from .vectors import FLOATS

__all__ = ["Operation", "Parts", "operation_of", "why_not"]


@dataclass
class Parts:
    """The neurons in force at one module, by what is to be done for them."""

    held: list[Neurons] = field(default_factory=list)
    outputs: list[Neurons] = field(default_factory=list)
    inputs: list[Neurons] = field(default_factory=list)
    biases: list[Neurons] = field(default_factory=list)

    @property
    def all(self) -> list[Neurons]:
        """All of them."""
        return [*self.held, *self.outputs, *self.inputs, *self.biases]

    def of(self, neurons: Neurons) -> list[Neurons]:
        """The list that ``neurons`` belong to."""
        if neurons.side == "bias":
            return self.biases
        if neurons.mode == "scatter":
            return self.held
        return self.inputs if neurons.side == "inputs" else self.outputs

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias as it is with its neurons in force."""
        for part in self.biases:
            assert bias is not None  # there are neurons of it
            if part.mode == "scatter":
                bias = apply(HeldBias, bias, part.rows, part.index)
            else:
                bias = bias.index_copy(0, part.index, part.rows.squeeze(1).to(bias.dtype))
        return bias


class Operation(Protocol):
    """How modules of one type compute.

    Attributes
    ----------
    quantized:
        Whether the weight is codes.
    looks_up:
        Whether it picks rows of the weight by their numbers.
    """

    quantized: bool
    looks_up: bool

    def side(self, axes: Sequence[int]) -> Side | None:
        """What neurons along ``axes`` of the weight are; None if that is not handled."""

    def run(self, module: Any, parts: Parts, x: Tensor) -> Tensor:
        """The forward pass."""


class _Linear:
    """`torch.nn.Linear`, and with ``transposed`` transformers' ``Conv1D``."""

    quantized = False
    looks_up = False

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def side(self, axes: Sequence[int]) -> Side | None:
        if len(axes) != 1:
            return None
        return "outputs" if (axes[0] == 1) is self.transposed else "inputs"

    def run(self, module: Any, parts: Parts, x: Tensor) -> Tensor:
        bias = parts.bias(module.bias)
        kept = x
        for part in parts.inputs:
            kept = kept.index_fill(-1, part.index, 0)
        out = self._compute(module, parts, kept, bias)
        return _laid_over(parts, x, out, bias)

    def _compute(self, module: Any, parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor:
        if not parts.held or not torch.is_grad_enabled():
            return matmul(x, module.weight, bias, self.transposed)
        (part,) = parts.held
        function = HeldOutputs if part.side == "outputs" else HeldInputs
        return apply(function, x, part.rows, module.weight, bias, part.index, self.transposed)


def _laid_over(parts: Parts, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    for part in parts.inputs:
        chosen = x.index_select(-1, part.index)
        out = out + chosen @ part.rows.to(chosen.dtype)
    for part in parts.outputs:
        here = None if bias is None else bias.index_select(0, part.index).to(x.dtype)
        chosen = functional.linear(x, part.rows.to(x.dtype), here)
        out = out.index_copy(-1, part.index, chosen.to(out.dtype))
    return out


class _Opaque:
    """A linear module that computes in its own way, such as a quantized one: overlay only."""

    quantized = True
    looks_up = False

    def side(self, axes: Sequence[int]) -> Side | None:
        if len(axes) != 1:
            return None
        return "outputs" if axes[0] == 0 else "inputs"

    def run(self, module: Any, parts: Parts, x: Tensor) -> Tensor:
        kept = x
        for part in parts.inputs:
            kept = kept.index_fill(-1, part.index, 0)
        out: Tensor = type(module).forward(module, kept)
        bias = parts.bias(module.bias)
        if bias is not None and parts.biases:  # the module has added its own
            out = out + (bias - module.bias).to(out.dtype)
        return _laid_over(parts, x, out, bias)


class _Convolution:
    """`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``, zero-padded by whole numbers."""

    quantized = False
    looks_up = False

    def side(self, axes: Sequence[int]) -> Side | None:
        return "outputs" if tuple(axes) == (0,) else None

    def run(self, module: Any, parts: Parts, x: Tensor) -> Tensor:
        if x.dim() == module.weight.dim() - 1:
            return self.run(module, parts, x.unsqueeze(0)).squeeze(0)
        bias = parts.bias(module.bias)
        geometry = (module.stride, _padding(module), module.dilation, module.groups)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[module.weight.dim() - 3]
        if not parts.held or not torch.is_grad_enabled():
            out: Tensor = convolve(x, module.weight, bias, *geometry)
        else:
            (part,) = parts.held
            out = apply(HeldConvolution, x, part.rows, module.weight, bias, part.index, *geometry)
        for part in parts.outputs:
            here = None if bias is None else bias.index_select(0, part.index).to(x.dtype)
            kernel = part.rows.to(x.dtype).view(-1, *module.weight.shape[1:])
            chosen: Tensor = convolve(x, kernel, here, *geometry)
            out = out.index_copy(1, part.index, chosen.to(out.dtype))
        return out


def _padding(module: Any) -> tuple[int, ...]:
    """The padding in numbers."""
    if module.padding == "valid":
        return tuple(0 for _ in module.kernel_size)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    padding: tuple[int, ...] = module.padding
    return padding


class _Embedding:
    """`torch.nn.Embedding`."""

    quantized = False
    looks_up = True

    def side(self, axes: Sequence[int]) -> Side | None:
        return "outputs" if tuple(axes) == (0,) else None

    def run(self, module: Any, parts: Parts, x: Tensor) -> Tensor:
        if not parts.held or not torch.is_grad_enabled():
            out = functional.embedding(x, module.weight)
        else:
            (part,) = parts.held
            out = apply(HeldEmbedding, x, part.rows, module.weight, part.slots, module.padding_idx)
        for part in parts.outputs:
            assert part.slots is not None  # made when it was wired
            slot, count = part.slots[x], len(part.index)
            chosen = functional.embedding(slot.clamp(max=count - 1), part.rows).to(out.dtype)
            if module.padding_idx is not None:  # its entry gets no gradient
                chosen = torch.where((x == module.padding_idx).unsqueeze(-1), chosen.detach(), chosen)
            out = torch.where((slot < count).unsqueeze(-1), chosen, out)
        return out


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def operation_of(module: nn.Module) -> Operation | None:
    """How ``module`` computes; None if that is not known.

    The class's own forward pass decides, not its name: a subclass that computes otherwise is another
    type. One whose weight is codes is taken for a linear map of what the codes mean.
    """
    kind: Any = type(module)
    if isinstance(module, nn.Linear):
        if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
            return None  # nn.MultiheadAttention takes its weight and never calls it
        if module.weight.dtype not in FLOATS:
            return _Opaque()
        return _Linear(transposed=False) if kind.forward is nn.Linear.forward else None
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return _Linear(transposed=True)
    if any(isinstance(module, c) and kind.forward is c.forward for c in _CONVOLUTIONS):
        return _Convolution()
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        return _Embedding()
    return None


def why_not(module: Any, operation: Operation, mode: Mode) -> str | None:
    """Why a module of a known type cannot have its neurons trained all the same; None if it can."""
    if isinstance(operation, _Convolution):
        if module.padding_mode != "zeros":
            return f"its padding is {module.padding_mode!r}; only zero padding is handled"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "it is padded on one side more than on the other"
        if module.groups > 1 and mode == "overlay":
            return "it is a grouped convolution, which an overlay does not handle"
    if isinstance(operation, _Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return "it renormalises its entries, or has scaled or sparse gradients"
    return None
