"""The tuner: PEFT replaces modules by those of `neftsurgery.peft.layer`, all chosen beforehand."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint.provenance import fingerprint
from ..errors import MismatchError, UsageError
from ..live.weights import is_plain
from ..text import some
from ..tuning.base_checkpoint import find_base
from ..tuning.forwards import forward_of, keep_gradients
from ..tuning.processes import refuse_tensor_parallel
from .base_vectors import file_vectors, neurons_in_files, quantization_of
from .choosing import ChosenNeurons, chosen_neurons
from .config import NeftConfig
from .layer import NeftLayer

log = logging.getLogger(__name__)


class NeftModel(BaseTuner):
    """Chosen neurons as adapters: made by ``get_peft_model(model, NeftConfig(...))``."""

    prefix = "neft_"
    tuner_layer_cls = NeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # no defaults: a budget is over the whole model

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the neurons of all modules are chosen before the first module is replaced."""
        config: Any = self.peft_config[adapter_name]
        self._chosen: dict[str, ChosenNeurons] = {}
        keep_gradients(model)
        refuse_tensor_parallel(model)
        if not config.counts:
            self._chosen = chosen_neurons(model, dict(_candidates(model, config)), config)
            config.counts = {
                name: [len(chosen.index), *chosen.layout.axes]
                for name, chosen in sorted(self._chosen.items())
            }
        self._refuse_unsupported(model, config)
        self._chosen |= _from_files(model, config, self._chosen)
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
            forward, problem = forward_of(module), None
            if attribute != "weight" or forward is None or forward.kind_of(axes) is None:
                problem = f"neurons along axes {list(axes)} of a {type(module).__name__} cannot be an adapter"
            elif others := [path for path in owners[id(module._parameters[attribute])] if path != own]:
                problem = f"the weight is tied to {others[0]}, and an adapter would change only one of them"
            elif not forward.covers(module):
                problem = f"neurons of {own} cannot be an adapter, by its padding, groups or norms"
            if problem is not None:
                raise UsageError(problem, tensor=name, hint="leave it out, or use neftsurgery.attach")

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
        layer = target
        if not isinstance(layer, NeftLayer):
            layer = NeftLayer(name, target, axes, quantization_of(self.model, target))
        if layer.layout.axes != axes:
            raise UsageError(
                "the module has an adapter with neurons along another axis",
                tensor=name,
                expected=list(layer.layout.axes),
                found=list(axes),
            )
        layer.update_layer(adapter_name, index, chosen)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within the context, each example of a batch has the adapter that ``adapter_names`` gives it."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        kinds = (NeftLayer, ModulesToSaveWrapper)
        layers: list[Any] = [one for one in self.modules() if isinstance(one, kinds)]
        batch = next((len(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), len(names))
        if unknown := {*names} - {"__base__", *self.peft_config}:
            raise UsageError("the model has no such adapter", found=", ".join(sorted(unknown)))
        if batch != len(names) or self.training or any(getattr(one, "merged", False) for one in layers):
            what = "adapter_names is a name for each example, in evaluation, while no adapter is merged"
            raise UsageError(what, found=f"{len(names)} names for {batch} examples")

        def pass_names(layer: Any, given: Any, named: dict[str, Any]) -> Any:
            return given, {**named, "adapter_names": names}

        handles = [one.register_forward_pre_hook(pass_names, with_kwargs=True) for one in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names in the bare model, without those that other adapters have put in."""
    return {key.removesuffix(".base_layer"): module for key, module in model.named_modules()}


def _from_files(
    model: nn.Module, config: NeftConfig, chosen: dict[str, ChosenNeurons]
) -> dict[str, ChosenNeurons]:
    """Neurons of quantized weights, with those of the base's files; warns if an adapter had others."""
    modules: Any = _modules(model)
    quantized = [name for name in config.counts if not is_plain(modules[name.removesuffix(".weight")].weight)]
    base, found = find_base(model, None) if quantized else None, {}
    if base is not None:
        files, known = fingerprint(base), config.base_fingerprint
        if known not in (None, files):
            warnings.warn(f"the adapter was trained on other files than those of {base.name}", stacklevel=2)
        if chosen:
            config.base_fingerprint = files
            places = neurons_in_files(base, config, {name: chosen[name].index for name in quantized})
            found = file_vectors(base, places)
        base.close()
    if left := [name for name in quantized if chosen and name not in found]:
        log.warning("neurons of %s start from dequantized values: the base's files are missing", some(left))
    return {name: dataclasses.replace(chosen[name], base=vectors) for name, vectors in found.items()}


def _candidates(model: nn.Module, config: NeftConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weights a budget may choose from, by the names of these."""
    within = config if config.target_modules else dataclasses.replace(config, target_modules=".*")
    for path, module in _modules(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and forward_of(module) and check_target_module_exists(within, path):
            yield f"{path}.weight", module
