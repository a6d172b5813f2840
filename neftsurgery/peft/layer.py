"""Modules with adapters of chosen neurons: their own forward passes with some of their vectors replaced.

A layer whose way to compute is known is wrapped by a `NeftLayer`, which has the adapters of its weight. Any
other module, such as one with the stacked weights of experts, is wrapped by a `NeftModule`: while the module
computes, its parameters carry the neurons (`neftsurgery.tuning.neuron_weight`).
"""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..live.weights import is_plain, read_vectors, write_vectors
from ..neurons.layout import Layout
from ..tuning.forwards import LayerForward, LayerNeurons, LinearForward, forward_of
from ..tuning.frozen_weights import FrozenLinear, apply_function
from ..tuning.linear_weight import LinearNeurons
from ..tuning.neuron_weight import NeuronWeight, WeightNeurons
from .base_vectors import base_digest, require_base, weight_shape
from .choosing import ChosenNeurons

_LOCK = threading.Lock()


class AdaptedWeight(nn.Module, BaseTunerLayer):
    """The adapters of one parameter of a module.

    ``neft_rows`` holds each adapter's vectors, ``[k, width]`` float32, in place of those of the weight;
    ``neft_index`` their neurons, int64 ``[k]``; ``neft_digest`` tells of which base, zeros if unknown.
    """

    adapter_layer_names = ("neft_rows",)
    other_param_names = ("neft_index", "neft_digest", "neft_saved")

    def __init__(self, name: str, module: nn.Module, axes: tuple[int, ...], quantization: Any = None) -> None:
        super().__init__()
        self.name, self.attribute = name, name.rpartition(".")[2]  # of the weight
        self.__dict__["base_layer"] = module  # not as a submodule
        self.layout = Layout.of(weight_shape(self.get_base_layer(), self.attribute), axes)
        self.neft_rows = nn.ParameterDict({})
        self.neft_index = BufferDict(persistent=True)
        self.neft_digest = BufferDict(persistent=True)
        self.neft_saved: dict[str, Tensor] = {}  # of merged adapters: the vectors that were replaced
        self.quantization_backend = quantization
        self.register_load_state_dict_post_hook(_check_base)  # type: ignore[no-untyped-call]
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []

    @property
    def held(self) -> Tensor:
        """The parameter, as the module holds it; of a replica of `nn.DataParallel` it is an attribute."""
        weight = getattr(self.get_base_layer(), self.attribute)
        return getattr(weight, "parameter", weight)  # type: ignore[no-any-return]

    def _whole(self) -> Tensor:
        """The parameter's values, in its shape; of a quantized one, a copy."""
        whole = self.held.data if self.quantization_backend is None else self.get_base_weight()
        return whole.view(self.layout.shape)

    def update_layer(self, adapter: str, index: Tensor, chosen: ChosenNeurons | None) -> None:
        """Add an adapter with these neurons; ``chosen`` None: its values and its base will be loaded."""
        device = self.held.device
        dtype = torch.float64 if self.held.dtype == torch.float64 else torch.float32
        values, digest = torch.zeros(len(index), self.layout.width, device=device), torch.zeros(16).byte()
        if chosen is not None and device.type != "meta":
            before = self.vectors(index.to(device)) if chosen.base is None else chosen.base
            values = (before if chosen.values is None else chosen.values).to(device)
            if chosen.base is not None or is_plain(self.held):
                digest = base_digest(before)
        self.neft_rows[adapter] = nn.Parameter(values.to(device, dtype, copy=True))
        self.neft_index[adapter], self.neft_digest[adapter] = index.to(device), digest.to(device)

    def vectors(self, index: Tensor) -> Tensor:
        """The vectors that the weight holds of neurons, ``[k, width]``; of a quantized one, dequantized."""
        return read_vectors(self._whole(), self.layout, index)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT's, but never to the base's dtype: rows keep what small steps have changed."""
        if adapter_name in self.neft_rows and not self.neft_rows[adapter_name].is_meta:
            device = device or self.held.device
            self.neft_rows[adapter_name].data = self.neft_rows[adapter_name].to(device)
            self.neft_index[adapter_name] = self.neft_index[adapter_name].to(device)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; several may not have a neuron in common."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.neft_rows]
        for position, name in enumerate(own):
            for other in own[:position]:
                shared = torch.isin(self.neft_index[name], self.neft_index[other]).sum()
                if not self.neft_index[name].is_meta and int(shared):
                    raise UsageError(
                        f"the adapters {other} and {name} have {int(shared)} neurons in common",
                        hint="activate one of them at a time",
                    )
        super().set_adapter(names, inference_mode=inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The difference that an adapter makes to the weight, in the weight's shape."""
        weight = self._whole()
        changed = weight.clone()
        write_vectors(changed, self.layout, self.neft_index[adapter], self.neft_rows[adapter].detach())
        return changed - weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the vectors of adapters into the weight; rounded to its dtype."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.neft_rows:
                continue
            rows, index = self.neft_rows[name].detach(), self.neft_index[name]
            if safe_merge and not bool(torch.isfinite(rows).all()):
                raise UsageError(f"the adapter {name} has values that are not finite")
            if self.quantization_backend is not None:
                warnings.warn("Merging into a quantized weight rounds the neurons to it.", stacklevel=2)
            self.neft_saved[name] = self.vectors(index)
            self._write(name, rows)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """The inverse of `merge`: to the bit, where the weight is not quantized."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._write(name, self.neft_saved.pop(name))

    def _write(self, adapter: str, vectors: Tensor) -> None:
        """Write vectors of an adapter's neurons into the weight."""
        weight = self._whole()
        write_vectors(weight, self.layout, self.neft_index[adapter], vectors)
        if self.quantization_backend is not None:
            self.set_base_weight(weight)

    def counts(self) -> bool:
        """Whether the forward pass computes with adapters: they are neither merged nor disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return not (self.disable_adapters or self.merged)

    def active(self) -> list[str]:
        """The active adapters that have neurons of the parameter."""
        return [name for name in self.active_adapters if name in self.neft_rows]

    def joined(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """The vectors and the numbers of the neurons of adapters."""
        parts = [(self.neft_rows[name], self.neft_index[name]) for name in adapters]
        if len(parts) == 1:
            return parts[0]
        rows, index = zip(*parts, strict=True)
        return torch.cat(rows), torch.cat(index)

    def carrying(self) -> NeuronWeight | None:
        """The parameter with the neurons of the active adapters, if there are any."""
        if not (self.counts() and self.active()):
            return None
        rows, index = self.joined(self.active())
        neurons: Any = SimpleNamespace(
            weight=self.held, layout=self.layout, rows=rows, index=index, by_expert=None, mode="overlay",
            trainable=True, disabled=False, refresh=lambda: None,
        )  # fmt: skip
        read = (LinearNeurons if LinearNeurons.fits((neurons,)) else WeightNeurons)((neurons,))
        return NeuronWeight.of(read, self.held, rows, self.layout, index)

    def __repr__(self) -> str:
        return "neft." + super().__repr__()

    def extra_repr(self) -> str:
        """How many neurons each adapter has."""
        counts = {name: len(self.neft_index[name]) for name in self.neft_rows}
        return ", ".join(f"{name}={count} of {self.layout.count}" for name, count in counts.items())


class NeftLayer(AdaptedWeight):
    """Wraps a linear layer, ``Conv1D``, convolution or embedding, plain or quantized."""

    def __init__(self, name: str, module: nn.Module, axes: tuple[int, ...], quantization: Any) -> None:
        super().__init__(name, module, axes, quantization)
        self.base_layer = module
        base = self.get_base_layer()
        self.computes: LayerForward = forward_of(base)  # type: ignore[assignment]  # checked before
        self.in_features, self.out_features = _get_in_out_features(base)  # type: ignore[var-annotated]

    @property
    def weight(self) -> Tensor:
        """The base's; it carries the neurons of the active adapters, for what computes with it by itself."""
        carrying = self.carrying() if is_plain(self.held) else None
        return super().weight if carrying is None else carrying

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's forward pass with the vectors of the active adapters."""
        if not self.counts():
            out: Tensor = self.base_layer(x, *args, **kwargs)
            return out
        return self._run(x, self.active()) if adapter_names is None else self._mixed(x, adapter_names)

    def _run(self, x: Tensor, adapters: list[str]) -> Tensor:
        if not adapters:
            out: Tensor = self.base_layer(x)
            return out
        base: Any = self.get_base_layer()
        inputs = self.computes.kind_of(self.layout.axes) == "inputs"
        if isinstance(self.computes, LinearForward) and is_plain(base.weight):
            rows, index = self.joined(adapters)
            delta = rows.detach() - self.vectors(index).to(rows.dtype)
            arguments = (x, rows, base.weight, base.bias, index, self.computes.transposed, inputs, delta)
            return apply_function(FrozenLinear, *arguments)
        layer = LayerNeurons()
        held = layer.overlaid_inputs if inputs else layer.overlaid_outputs
        held.extend(self._overlaid(name) for name in adapters)
        return self.computes.run(base, layer, x)

    def _overlaid(self, adapter: str) -> Any:
        """The neurons of one adapter, as the forward passes of `neftsurgery.tuning` want them."""
        index = self.neft_index[adapter]
        inverse = None
        if self.computes.is_lookup:
            inverse = torch.full((self.layout.count,), len(index), device=index.device)
            inverse[index] = torch.arange(len(index), device=index.device)
        return SimpleNamespace(rows=self.neft_rows[adapter], index=index, inverse_index=inverse)

    def _mixed(self, x: Tensor, names: list[str]) -> Tensor:
        """A batch of which each example has its own adapter; ``__base__``: none."""
        places, outputs = list[Tensor](), list[Tensor]()
        names = [name for name in names for _ in range(len(x) // len(names))]  # of beams
        for name in dict.fromkeys(names):
            places.append(torch.tensor([n for n, one in enumerate(names) if one == name], device=x.device))
            own = [name] if name in self.neft_rows else []
            outputs.append(self._run(x.index_select(0, places[-1]), own))
        return torch.cat(outputs).index_select(0, torch.cat(places).argsort())


class NeftModule(nn.Module):
    """Wraps a module that reads parameters itself: they carry the neurons of the active adapters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.running = module, 0
        self.adapted = nn.Module()  # its modules have the names of the parameters

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the module's: a parent may read its parameters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "adapted"):
                raise
            one: Any = self.adapted._modules.get(name)
            carrying = None if one is None else one.carrying()
            return getattr(self.base_layer, name) if carrying is None else carrying

    def get_base_layer(self) -> nn.Module:
        """The module."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `AdaptedWeight.merge`, of all parameters."""
        weight: Any
        for weight in self.adapted.children():
            weight.merge(safe_merge, adapter_names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with the vectors of the active adapters."""
        weights: Any = self.adapted.named_children()
        carrying = {name: found for name, one in weights if (found := one.carrying()) is not None}
        attributes = self.base_layer.__dict__
        with _LOCK:  # other threads may compute with the module meanwhile
            self.running += 1
            attributes.update(carrying)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            with _LOCK:
                self.running -= 1
                for name in carrying if not self.running else ():
                    attributes.pop(name, None)


def _check_base(weight: AdaptedWeight, *_: Any) -> None:
    """Refuse an adapter that was loaded if the vectors that it replaces are not those of its own base."""
    held = weight.held
    if weight.merged or not is_plain(held) or held.is_meta:
        return
    for adapter in weight.neft_rows:
        try:
            vectors = weight.vectors(weight.neft_index[adapter])
            require_base(adapter, weight.name, weight.neft_digest[adapter], vectors)
        except MismatchError as error:
            if held.dtype != torch.float16:
                raise
            warnings.warn(f"float16 does not hold the base's values, or {error}", stacklevel=2)
