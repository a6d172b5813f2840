"""Where PEFT, by how it matches modules, adapts tensors of files, and whether it takes an adapter."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.checkpoint import Checkpoint
from ..errors import MismatchError, UsageError
from ..patch.patch import Patch
from ..surgery.lora_modules import LoraPlace, LoraPlaces
from ..tensors.arrays import Int64Array
from ..tensors.header import TensorInfo
from ..text import some
from .loading import meta_model
from .placement import LivePlace, live_places

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_SHOWN = 300  # characters of PEFT's message
# What PEFT raises for modules, names and shapes that it cannot use.
_FAILURES = (ValueError, LookupError, AttributeError, TypeError, RuntimeError)


class PeftPlaces:
    """The live model of a patch's base, as PEFT sees it; a `UsageError` if its config gives no such model."""

    def __init__(self, base: Checkpoint, patch: Patch) -> None:
        self._name = base.name
        self._model: Any = meta_model(base, "saved")
        self._weights = dict(self._model.named_parameters(remove_duplicate=False))
        layouts = {name: tensor.layout for name, tensor in patch.tensors.items()}
        refused, found = dict[str, str](), dict[str, tuple[LivePlace, ...]]()
        while layouts and not found:
            try:
                found = live_places(self._model, layouts)
            except MismatchError as error:
                if error.tensor is None or layouts.pop(error.tensor, None) is None:
                    raise
                refused[error.tensor] = error.what
        placed = {name: self._places(ones, patch.index(name)) for name, ones in found.items()}
        self.places: LoraPlaces = refused | placed

    def _places(self, places: Iterable[LivePlace], index: Int64Array) -> Sequence[LoraPlace] | str:
        found = [self._place(place, index) for place in places]
        why = next((one for one in found if isinstance(one, str)), None)
        return why or [one for one in found if isinstance(one, LoraPlace)]

    def _place(self, place: LivePlace, index: Int64Array) -> LoraPlace | str:
        live, weight = place.parameter, self._weights.get(place.parameter)
        if weight is None:
            return "not a parameter"
        if weight.shape != place.layout.shape:
            raise UsageError(
                "config.json describes another model",
                file=self._name,
                tensor=live,
                expected=list(place.layout.shape),
                found=list(weight.shape),
            )
        tied = [name for name, other in self._weights.items() if other is weight and name != live]
        if tied:
            return f"tied to {tied[0]}, which PEFT would leave as it is"
        path, _, parameter = live.rpartition(".")
        module = self._model.get_submodule(path)
        form = self._form(path, module, parameter, weight)
        if form is None:
            return f"{parameter} of a {type(module).__name__}"
        transposed, order = form == "embedding" or isinstance(module, Conv1D), 0
        if form == "parameter":
            transposed = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
            order = [own for own, _ in module.named_parameters()].index(parameter)
        index = place.index_of(index)
        return LoraPlace.of(
            path, place.layout, index, form, transposed=transposed, parameter=parameter, order=order
        )

    def _form(self, path: str, module: nn.Module, parameter: str, weight: torch.Tensor) -> Any:
        """How PEFT adapts a weight; None if it does not, or not exactly."""
        if parameter == "weight" and self._bypassed(path, module):
            return None
        if parameter == "weight" and isinstance(module, nn.Linear | Conv1D):
            return self._as_module(path)
        if parameter == "weight" and isinstance(module, nn.Embedding):
            plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
            return "embedding" if plain and module.max_norm is None else None
        if parameter == "weight" and type(module) in _CONVOLUTIONS:
            # PEFT's factors do not take over these settings; and it multiplies kernels [1, 1, n] as matrices.
            conv: Any = module
            usual = (conv.groups, {*conv.dilation}, conv.padding_mode) == (1, {1}, "zeros")
            return "convolution" if usual and not (weight.ndim == 5 and weight.shape[2:4] == (1, 1)) else None
        leaf = path and all("." not in own for own, _ in module.named_parameters())
        kernel = hasattr(module, "kernel_size")
        return "parameter" if leaf and weight.ndim == 3 and len(weight) > 1 and not kernel else None

    def _bypassed(self, path: str, module: nn.Module) -> bool:
        """Whether another module reads this one's weight, or calls it by a list: PEFT's is passed by."""
        outer, _, name = path.rpartition(".")
        parent = self._model.get_submodule(outer)
        lists = (value for value in vars(parent).values() if isinstance(value, list | tuple))
        if any(one is module for value in lists for one in value):
            return True
        weight = rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b"
        read = re.compile(weight + r"(?!\.(dtype|device|shape|size|numel)|\s*=[^=])")
        owner: Any = type(parent)
        if any(read.search(source) for source in _sources(owner)):
            return True
        # An embedding is handed to a decoder, which reads its weight.
        handed = re.compile(rf"\w=self(\.\w+)*\.{re.escape(name)}\b(?!\s*[.(\[])")
        modules = self._model.modules() if isinstance(module, nn.Embedding) else ()
        classes: set[Any] = {type(one) for one in modules}
        return any(handed.search(source) for cls in classes for source in _sources(cls))

    def _as_module(self, path: str) -> Any:
        """How PEFT adapts a linear layer; some names it takes for experts that transformers stacks."""
        config, parent = LoraConfig(target_modules=[path]), self._model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):  # reads the weight itself
            return None
        try:
            _check_lora_target_modules_mamba(config, self._model, path.rpartition(".")[2])
        except ValueError:
            return None
        try:
            convert_peft_config_for_transformers(config, self._model, [])
        except ValueError:  # others of these experts are missing
            return "parameter"
        return "linear" if path in (config.target_modules or ()) else "parameter"

    def others(self, targets: Collection[str]) -> list[str]:
        """The modules that PEFT takes for one of ``targets``, as their names end in its name."""
        endings = tuple(f".{target}" for target in targets)
        names = [name for name, _ in self._model.named_modules() if name.endswith(endings)]
        return sorted(set(names).difference(targets))

    def check(self, config: Mapping[str, Any], entries: Sequence[TensorInfo]) -> None:
        """Raise a `MismatchError` unless PEFT puts all of this adapter into the model, and lacks nothing."""
        factors = {entry.name: torch.empty(entry.shape, device="meta") for entry in entries}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(self._model, LoraConfig(**config), low_cpu_mem_usage=True)
                result: Any = set_peft_model_state_dict(model, factors, low_cpu_mem_usage=True)
        except _FAILURES as error:
            raise self._not_taken(" ".join(str(error).split())[:_MOST_SHOWN]) from error
        lost = [f"{name} is not in the model" for name in result.unexpected_keys]
        lost += [f"{name} is missing" for name in result.missing_keys if ".lora_" in name]
        if lost:
            raise self._not_taken(some(lost, 2))

    def _not_taken(self, why: str) -> MismatchError:
        return MismatchError(
            "PEFT does not take this adapter",
            file=self._name,
            found=why,
            hint="leave these tensors out when neurons are chosen ([[exclude]]), or write the patched "
            "checkpoint: `neftsurgery apply BASE PATCH -o OUT`",
        )


@functools.cache
def _sources(cls: type) -> list[str]:
    """The methods of a class that a forward pass may call, as text."""
    methods: list[Any] = []
    for one in cls.__mro__:
        if one.__module__.startswith("torch.") or one.__name__ == "PreTrainedModel":
            break
        methods += (each for each in vars(one).values() if inspect.isfunction(each))
    return [inspect.getsource(each) for each in methods if "init" not in each.__name__]
