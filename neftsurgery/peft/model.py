"""The tuner: PEFT replaces modules by those of `neftsurgery.peft.layer`, all chosen beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from ..errors import MismatchError, UsageError
from ..neurons.layout import Layout
from ..tuning.forwards import forward_of
from .choosing import ChosenNeurons, chosen_neurons
from .config import NeftConfig
from .layer import NeftLayer


class NeftModel(BaseTuner):
    """Chosen neurons as adapters: made by ``get_peft_model(model, NeftConfig(...))``."""

    prefix = "neft_"
    tuner_layer_cls = NeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # no defaults: a budget is over the whole model

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the neurons of all modules are chosen before the first module is replaced."""
        config: Any = self.peft_config[adapter_name]
        self._chosen: dict[str, ChosenNeurons] = {}
        if not config.counts:
            self._chosen = chosen_neurons(model, dict(_candidates(model, config)), config)
            config.counts = {
                name: [len(chosen.index), *chosen.layout.axes]
                for name, chosen in sorted(self._chosen.items())
            }
        self._refuse_unsupported(model, config)
        config.target_modules = sorted(name.rpartition(".")[0] for name in config.counts)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._chosen = {}  # the layers have copies

    def _refuse_unsupported(self, model: nn.Module, config: NeftConfig) -> None:
        modules = _modules(model)
        owners: dict[int, list[str]] = {}
        for path, owner in modules.items():
            owners.setdefault(id(owner._parameters.get("weight")), []).append(path)
        for name, (_, axes) in config.layouts().items():
            own, _, attribute = name.rpartition(".")
            module = modules.get(own)
            if module is None:
                raise MismatchError(
                    "the model has no such module", tensor=name, hint="use the adapter's own base"
                )
            forward = forward_of(module)
            if attribute != "weight" or forward is None or forward.kind_of(axes) is None:
                raise UsageError(
                    f"neurons along axes {list(axes)} of a {type(module).__name__} cannot be an adapter",
                    tensor=name,
                    hint="leave it out, or use neftsurgery.attach",
                )
            if others := [path for path in owners[id(module._parameters[attribute])] if path != own]:
                raise UsageError(
                    f"the weight is tied to {others[0]}, and an adapter would change only one of the two",
                    tensor=name,
                    hint="untie them first, or use neftsurgery.attach, which trains both",
                )
            if not forward.covers(module):
                raise UsageError(
                    f"neurons of {own} cannot be an adapter, by its padding, groups or norms",
                    tensor=name,
                    hint="leave it out, or use neftsurgery.attach",
                )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return f"{key}.weight" in peft_config.counts

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        name = f"{current_key}.weight"
        count, axes = peft_config.layouts()[name]
        chosen = self._chosen.get(name)
        index = torch.zeros(count, dtype=torch.int64) if chosen is None else torch.from_numpy(chosen.index)
        layer = target if isinstance(target, NeftLayer) else _layer(target, axes)
        if layer.layout.axes != axes:
            raise UsageError(
                "the module has an adapter with neurons along another axis",
                tensor=name,
                expected=list(layer.layout.axes),
                found=list(axes),
            )
        layer.update_layer(adapter_name, index, None if chosen is None else chosen.values)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within the context, each example of a batch has the adapter that ``adapter_names`` gives it."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if unknown := {*(names or [])} - {"__base__", *self.peft_config}:
            raise UsageError("the model has no such adapter", found=", ".join(sorted(unknown)))
        layers = [] if names is None else [one for one in self.modules() if isinstance(one, NeftLayer)]
        try:
            for layer in layers:
                layer.adapter_of_example = names
            yield
        finally:
            for layer in layers:
                layer.adapter_of_example = None


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names in the bare model, without those that other adapters have put in."""
    return {key.removesuffix(".base_layer"): module for key, module in model.named_modules()}


def _layer(module: nn.Module, axes: tuple[int, ...]) -> NeftLayer:
    forward = forward_of(module)
    assert forward is not None  # checked before the first module is replaced
    own: Any = module
    shape = (own.out_features, own.in_features) if forward.quantized else tuple(own.weight.shape)
    return NeftLayer(module, forward, Layout.of(shape, axes))


def _candidates(model: nn.Module, config: NeftConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights that a budget may choose from."""
    within = config if config.target_modules else dataclasses.replace(config, target_modules=".*")
    for path, module in _modules(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and forward_of(module) and check_target_module_exists(within, path):
            yield f"{path}.weight", weight
