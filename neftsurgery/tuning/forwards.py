"""Forward passes of the common layer types, with neurons attached to their weights.

In scatter mode the frozen weight of a linear layer or convolution already contains the neurons' values, so
the forward pass only gives them gradients (see `frozen_weights`). In overlay mode, and in other layers, the
weight is not read there: chosen outputs are computed separately and replace those of the weight; chosen
inputs are zeroed before the weight is applied, and their contribution is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..live.weights import FLOAT_DTYPES
from .attached_neurons import AttachedNeurons, NeuronKind
from .frozen_weights import FrozenLinear, apply_function, linear


@dataclass
class LayerNeurons:
    """The attached neurons that the forward pass of one module computes with."""

    scattered: list[AttachedNeurons] = field(default_factory=list)
    overlaid_outputs: list[AttachedNeurons] = field(default_factory=list)
    overlaid_inputs: list[AttachedNeurons] = field(default_factory=list)
    biases: list[AttachedNeurons] = field(default_factory=list)

    @classmethod
    def of(cls, attached: Iterable[AttachedNeurons], in_place: bool) -> LayerNeurons:
        """Those of ``attached`` that count now; ``in_place``: values in the weight are used from there.

        A compiled graph overlays them all: it cannot know when a weight is stale, but takes values as inputs.
        """
        layer, in_place = cls(), in_place and not torch.compiler.is_compiling()
        for neurons in attached:
            if neurons.disabled:
                continue
            if neurons.kind == "bias":
                layer.biases.append(neurons)
            elif neurons.mode == "scatter" and in_place:
                layer.scattered.append(neurons)
            else:
                (layer.overlaid_inputs if neurons.kind == "inputs" else layer.overlaid_outputs).append(
                    neurons
                )
        return layer

    def weight(self, module: Any) -> Tensor:
        """The weight of ``module``, to compute with: the parameter, if the module does the neurons' part."""
        ours = self.scattered or self.overlaid_outputs or self.overlaid_inputs
        weight: Tensor = module._parameters["weight"] if ours else module.weight
        return weight

    def bias(self, module: Any) -> Tensor | None:
        """The bias of ``module``, with the values of its neurons."""
        bias: Tensor | None = module._parameters["bias"] if self.biases else module.bias
        for neurons in self.biases:
            assert bias is not None  # it has neurons
            bias = bias.index_copy(0, neurons.index, neurons.rows.squeeze(1).to(bias.dtype))
        return bias


class LayerForward:
    """How layers of one type compute."""

    in_place = False  # whether it computes with values that are written into the weight
    quantized = False  # whether the weight is quantized
    is_lookup = False  # whether the layer looks rows of the weight up by their number

    def kind_of(self, axes: Sequence[int]) -> NeuronKind | None:
        """What neurons along ``axes`` of the weight are to the layer; None if they are not supported."""
        return "outputs" if tuple(axes) == (0,) else None

    def covers(self, module: Any) -> bool:
        """Whether this one layer computes so; if not, its weight carries the neurons (`neuron_weight`)."""
        return True

    def run(self, module: Any, layer: LayerNeurons, x: Tensor) -> Tensor:
        """The forward pass."""
        raise NotImplementedError


class LinearForward(LayerForward):
    """`torch.nn.Linear`; with ``transposed``, transformers' ``Conv1D``."""

    in_place = True

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def kind_of(self, axes: Sequence[int]) -> NeuronKind | None:
        """Outputs or inputs."""
        if len(axes) != 1:
            return None
        return "outputs" if (axes[0] == 1) is self.transposed else "inputs"

    def run(self, module: Any, layer: LayerNeurons, x: Tensor) -> Tensor:
        """The forward pass."""
        weight, bias = layer.weight(module), layer.bias(module)
        kept = _without_overlaid_inputs(layer, x)
        if not layer.scattered or not torch.is_grad_enabled():
            out = linear(kept, weight, bias, self.transposed)
        else:
            (neurons,) = layer.scattered  # a weight has at most one set that is trained
            arguments = (kept, neurons.rows, weight, bias, neurons.index, self.transposed)
            out = apply_function(FrozenLinear, *arguments, neurons.kind == "inputs")
        return _overlay(layer, x, out, bias)


class _QuantizedLinear(LinearForward):
    """A linear layer with a quantized weight; it computes in its own way, so it supports only overlays."""

    quantized = True

    def run(self, module: Any, layer: LayerNeurons, x: Tensor) -> Tensor:
        out: Tensor = type(module).forward(module, _without_overlaid_inputs(layer, x))
        bias = layer.bias(module)
        if bias is not None and layer.biases:  # the module has added its own bias
            out = out + (bias - module.bias).to(out.dtype)
        return _overlay(layer, x, out, bias)


def keep_gradients(model: nn.Module) -> None:
    """Have bitsandbytes' 4-bit layers keep their codes in order: on a CPU, an evaluation reorders them.

    From then on they cut gradients, and their weights are read wrongly, without a word.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # puts them in order


def _without_overlaid_inputs(layer: LayerNeurons, x: Tensor) -> Tensor:
    for neurons in layer.overlaid_inputs:
        x = x.index_fill(-1, neurons.index, 0)
    return x


def _overlay(layer: LayerNeurons, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """Add the overlaid inputs' contributions to ``out``, and replace its overlaid outputs."""
    for neurons in layer.overlaid_inputs:
        chosen = x.index_select(-1, neurons.index)
        out = out + chosen @ neurons.rows.to(chosen.dtype)
    for neurons in layer.overlaid_outputs:
        chosen = functional.linear(x, neurons.rows.to(x.dtype), _chosen_bias(neurons, bias, x))
        out = out.index_copy(-1, neurons.index, chosen.to(out.dtype))
    return out


def _chosen_bias(neurons: AttachedNeurons, bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.index_select(0, neurons.index).to(x.dtype)


class _Convolution(LayerForward):
    """`torch.nn.Conv1d`, ``Conv2d`` and ``Conv3d``, with even zero padding."""

    in_place = True

    def covers(self, module: Any) -> bool:
        return bool(module.padding_mode == "zeros" and module.groups == 1)

    def run(self, module: Any, layer: LayerNeurons, x: Tensor) -> Tensor:
        weight, bias = layer.weight(module), layer.bias(module)
        if x.dim() == weight.dim() - 1:
            return self.run(module, layer, x.unsqueeze(0)).squeeze(0)
        convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.dim() - 3]
        geometry = (module.stride, module.padding, module.dilation)
        out: Tensor = convolve(x, weight, bias, *geometry)

        def chosen(neurons: AttachedNeurons) -> Tensor:
            kernel = neurons.rows.to(x.dtype).view(-1, *weight.shape[1:])
            computed: Tensor = convolve(x, kernel, _chosen_bias(neurons, bias, x), *geometry)
            return computed.to(out.dtype)

        for neurons in layer.overlaid_outputs:
            out = out.index_copy(1, neurons.index, chosen(neurons))
        for neurons in layer.scattered if torch.is_grad_enabled() else ():
            # The gradient alone is the rows': the value is the plain layer's, to the bit.
            new, value = chosen(neurons), out.index_select(1, neurons.index).detach()
            out = out.index_copy(1, neurons.index, new - new.detach() + value)
        return out


class _Embedding(LayerForward):
    """`torch.nn.Embedding`."""

    is_lookup = True

    def covers(self, module: Any) -> bool:
        return not (module.scale_grad_by_freq or module.sparse or module.max_norm)

    def run(self, module: Any, layer: LayerNeurons, x: Tensor) -> Tensor:
        padding = module.padding_idx
        out = functional.embedding(x, layer.weight(module))
        for neurons in layer.overlaid_outputs:
            assert neurons.inverse_index is not None  # made when the forward pass was replaced
            position, count = neurons.inverse_index[x], len(neurons.index)
            chosen = functional.embedding(position.clamp(max=count - 1), neurons.rows).to(out.dtype)
            if padding is not None:  # the padding entry gets no gradient
                chosen = torch.where((x == padding).unsqueeze(-1), chosen.detach(), chosen)
            out = torch.where((position < count).unsqueeze(-1), chosen, out)
        return out


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def forward_of(module: nn.Module) -> LayerForward | None:
    """How ``module`` computes, as its class's forward method says, not its name; None if unknown."""
    cls: Any = type(module)
    if isinstance(module, nn.Linear):
        if cls is nn.modules.linear.NonDynamicallyQuantizableLinear:
            return None  # nn.MultiheadAttention uses its weight without calling it
        if module.weight.dtype not in FLOAT_DTYPES:
            return _QuantizedLinear(transposed=False)
        return LinearForward(transposed=False) if cls.forward is nn.Linear.forward else None
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return LinearForward(transposed=True)
    if any(isinstance(module, c) and cls.forward is c.forward for c in _CONVOLUTIONS):
        return _Convolution()
    if isinstance(module, nn.Embedding) and cls.forward is nn.Embedding.forward:
        return _Embedding()
    return None
