"""The tuner: PEFT replaces modules by those of `neftsurgery.peft.layer`, all chosen beforehand."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoint.provenance import fingerprint
from ..errors import MismatchError, UsageError
from ..live.weights import is_plain
from ..text import some
from ..tuning.base_checkpoint import find_base
from ..tuning.forwards import forward_of, keep_gradients
from ..tuning.install import has_foreign_forward
from ..tuning.processes import refuse_tensor_parallel
from ..tuning.weight_plans import unreadable
from .base_vectors import file_vectors, neurons_in_files, quantization_of
from .choosing import ChosenNeurons, chosen_neurons
from .config import NeftConfig
from .layer import AdaptedWeight, NeftLayer, NeftModule

log = logging.getLogger(__name__)


class NeftModel(BaseTuner):
    """Chosen neurons as adapters: made by ``get_peft_model(model, NeftConfig(...))``."""

    prefix = "neft_"
    tuner_layer_cls = AdaptedWeight
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # no defaults: a budget is over the whole model

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the neurons of all modules are chosen before the first module is replaced."""
        config: Any = self.peft_config[adapter_name]
        self._chosen: dict[str, ChosenNeurons] = {}
        keep_gradients(model)
        for weight in model.modules():  # as PEFT does once the new one is there
            if isinstance(weight, AdaptedWeight) and weight.merged:
                weight.unmerge()
        refuse_tensor_parallel(model)
        if not config.counts:
            self._chosen = chosen_neurons(model, dict(_candidates(model, config)), config)
            config.counts = {
                name: [len(chosen.index), *chosen.layout.axes]
                for name, chosen in sorted(self._chosen.items())
            }
        require_supported(model, {name: axes for name, (_, axes) in config.layouts().items()})
        self._chosen |= _from_files(model, config, self._chosen)
        config.target_modules = sorted({name.rpartition(".")[0] for name in config.counts})
        config.exclude_modules = None  # it has been heeded
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._chosen = {}  # the layers have copies

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return any(name.rpartition(".")[0] == key for name in peft_config.counts)

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
        for name, (count, axes) in peft_config.layouts().items():
            owner, _, attribute = name.rpartition(".")
            if owner == current_key:
                weight = self._adapted(parent, target_name, name, attribute, axes)
                chosen, index = self._chosen.get(name), torch.zeros(count, dtype=torch.int64)
                index = index if chosen is None else torch.from_numpy(chosen.index)
                weight.update_layer(adapter_name, index, chosen)
                weight.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _adapted(
        self, parent: nn.Module, child: str, name: str, attribute: str, axes: tuple[int, ...]
    ) -> AdaptedWeight:
        """What holds the adapters of a parameter, put into the model if it is not there."""
        weight: Any = getattr(parent, child)
        if not isinstance(weight, (NeftLayer, NeftModule)):
            module, known = weight, forward_of(weight) is not None
            how = quantization_of(self.model, module)
            weight = NeftLayer(name, module, axes, how) if known else NeftModule(module)
            self._replace_module(parent, child, weight, module)
        if isinstance(weight, NeftModule):
            if not hasattr(weight.adapted, attribute):
                weight.adapted.add_module(attribute, AdaptedWeight(name, weight.base_layer, axes))
            weight = getattr(weight.adapted, attribute)
        return weight  # type: ignore[no-any-return]

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, NeftLayer) or isinstance(new_module, NeftLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # PEFT looks for a weight
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Within the context, each example of a batch has the adapter that ``adapter_names`` gives it."""
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        layers: list[Any] = [m for m in self.modules() if isinstance(m, (NeftLayer, ModulesToSaveWrapper))]
        batch = next((len(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), len(names))
        if unknown := {*names} - {"__base__", *self.peft_config}:
            raise UsageError("the model has no such adapter", found=", ".join(sorted(unknown)))
        own = [m for m in self.modules() if isinstance(m, AdaptedWeight) and not isinstance(m, NeftLayer)]
        if own:
            what = "examples cannot have adapters of their own for stacked weights, or what else modules read"
            raise UsageError(what, tensor=own[0].name, hint="run a batch for each adapter")
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
    return {
        key.removesuffix(".base_layer"): module
        for key, module in model.named_modules()
        if {"modules_to_save", "original_module"}.isdisjoint(key.split("."))
    }


def require_supported(model: nn.Module, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an error unless neurons along these axes of the model's parameters can be an adapter."""
    modules = _modules(model)
    held = {one.name: one.layout.axes for one in model.modules() if isinstance(one, AdaptedWeight)}
    owners: dict[int, list[str]] = {}
    for path, owner in modules.items():
        for parameter in owner._parameters.values():
            owners.setdefault(id(parameter), []).append(path)
    for name, axes in wanted.items():
        own, _, attribute = name.rpartition(".")
        module = modules.get(own)
        parameter = None if module is None else module._parameters.get(attribute)
        if module is None or parameter is None:
            raise MismatchError(
                "the model has no such parameter", tensor=name, hint="use the adapter's own base"
            )
        problem = _unsupported(module, attribute, axes) if own else "the model reads it itself"
        if isinstance(m := model.get_submodule(own), BaseTunerLayer) and not isinstance(m, AdaptedWeight):
            problem = "its module has an adapter of another method"
        if held.get(name, axes) != axes:
            problem = f"it has an adapter with neurons along other axes, {list(held[name])}, not {list(axes)}"
        if others := [path for path in owners[id(parameter)] if path != own]:
            problem = f"the weight is tied to {others[0]}, and an adapter would change only one of them"
        if problem is not None:
            raise UsageError(problem, tensor=name, hint="leave it out, or use neftsurgery.attach")


def _from_files(
    model: nn.Module, config: NeftConfig, chosen: dict[str, ChosenNeurons]
) -> dict[str, ChosenNeurons]:
    """Neurons of quantized weights, with those of the base's files; warns if an adapter had others."""
    modules, quantized = _modules(model), []
    for name in config.counts:
        owner, _, attribute = name.rpartition(".")
        if not is_plain(modules[owner]._parameters[attribute]):  # type: ignore[arg-type]  # it was found before
            quantized.append(name)
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


def _unsupported(module: nn.Module, attribute: str, axes: tuple[int, ...]) -> str | None:
    """Why neurons of a parameter cannot be an adapter; None if they can."""
    forward, weight = forward_of(module), module._parameters[attribute]
    assert weight is not None  # the model has it
    if forward is None and _is_read(module):
        return unreadable(module, attribute, not is_plain(weight), has_foreign_forward(module))
    if forward is None or attribute != "weight" or forward.kind_of(axes) is None:
        return f"{attribute} along axes {list(axes)} of a {type(module).__name__} cannot be an adapter"
    return None if forward.covers(module) else "its layer has padding, groups or norms that forbid it"


def _is_read(module: nn.Module) -> bool:
    """Whether a `NeftModule` can stand before a module, which has no parts and is called or read by name."""
    inner = any(True for child in module.children() for _ in child.parameters())
    return not (inner or isinstance(module, nn.RNNBase) or hasattr(type(module), "__getitem__"))


def _candidates(model: nn.Module, config: NeftConfig) -> Iterator[tuple[str, nn.Module]]:
    """The parameters that a budget may choose from, by name, and their modules.

    They are weights of layers whose way to compute is known, and what other modules read themselves. Those
    that cannot be adapted are not among them.
    """
    within = config if config.target_modules else dataclasses.replace(config, target_modules=".*")
    for path, module in _modules(model).items():
        forward = forward_of(module)
        covered = _is_read(module) if forward is None else forward.covers(module)
        if not (path and covered and check_target_module_exists(within, path)):
            continue  # PEFT wraps no whole model
        for attribute, weight in module._parameters.items():
            if (forward is not None and attribute == "weight") or (
                forward is None and weight is not None and weight.dim() > 1 and is_plain(weight)
            ):
                yield f"{path}.{attribute}", module
