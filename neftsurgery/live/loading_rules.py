"""What ``from_pretrained`` does to the tensors of a checkpoint's files, by transformers' own functions.

Most tensors keep their names. Some are renamed (GPT-NeoX, ViT), or get or lose the ``base_model_prefix``. A
*converter* merges, splits, transposes or permutes tensors. `LoadingRules` is the only class that uses
transformers' private modules.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError
from ..neurons.submodels import split_part


def live_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``model``, under all their names."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {**dict(buffers), **dict(model.named_parameters(remove_duplicate=False))}


class LoadingRules:
    """How the weights of ``model`` are made of the tensors in files; not of transformers, they are these."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = live_weights(model)
        self._model: Any = model
        self._found: dict[str, tuple[str, str | None]] = {}
        module = sys.modules.get("transformers.modeling_utils")  # not imported here
        self._renames = module is not None and isinstance(model, module.PreTrainedModel)
        if not self._renames:
            return
        try:
            self._read_conversions()
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise MismatchError(
                f"cannot tell how this version of transformers renames a model's weights: {error}",
                hint="use a version of transformers that neftsurgery was tested with (see pyproject.toml)",
            ) from error

    def _read_conversions(self) -> None:
        from transformers import conversion_mapping, core_model_loading

        self._loading: Any = core_model_loading
        # The conversions that loading used; for a model that was never loaded, those it would use.
        mapping: Any = copy.deepcopy(getattr(self._model, "_weight_conversions", None))
        if mapping is None:
            mapping = conversion_mapping.get_model_conversion_mapping(self._model)
        self._renamings = [one for one in mapping if isinstance(one, self._loading.WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, self._loading.WeightConverter)]
        if len(self._renamings) + len(self._converters) != len(mapping):
            raise TypeError("a conversion of an unknown kind")
        self._by_pattern = {name: one for one in self._converters for name in one.source_patterns}
        grouped = getattr(self._loading, "GroupWeightRename", ())  # transformers 5.6 has none
        if any(isinstance(one, grouped) for one in self._renamings):
            for name in self.in_order(self.written(self.weights)):  # some names tell how others are read
                self._rename(name, self._renamings, self._converters)
        self._rename("weight", [], [])  # fails here, not later, if the function's signature has changed

    def _rename(self, name: str, renamings: Any, converters: Any) -> tuple[str, str | None]:
        live, pattern = self._loading.rename_source_key(
            name, renamings, converters, self._model.base_model_prefix, self.weights
        )
        return str(live), pattern

    def find(self, name: str) -> tuple[str, str | None]:
        """The first weight that a tensor becomes, and its converter's pattern; else a `MismatchError`."""
        if name not in self._found:
            plain = name if name in self.weights else split_part(name)[1]  # a part is attached by itself
            live, pattern = plain, None
            if self._renames:
                live, pattern = self._rename(plain, self._renamings, self._converters)
                if live not in self.weights and plain in self.weights:  # as the loader does
                    live, pattern = self._rename(plain, [], [])
            if live not in self.weights:
                raise MismatchError(
                    "the model has no such weight",
                    tensor=name,
                    expected=live if live != name else None,
                    found=self._similar(live),
                    hint="use the tensor names of the checkpoint that the model was loaded from",
                )
            self._found[name] = live, pattern
        return self._found[name]

    def _similar(self, name: str) -> str:
        """Some names with the same ending as ``name``, or the first names of all."""
        endings = [".".join(name.split(".")[-parts:]) for parts in (3, 2)]
        alike = ([other for other in self.weights if other.endswith(one)] for one in (*endings, ""))
        return ", ".join(next(filter(None, alike), [])[:2]) or "a model without parameters"

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names of tensors in the order in which the loader takes them."""
        return sorted(names, key=self._loading.dot_natural_key)

    def renamed(self, name: str) -> str:
        """The name of a tensor as converters see it."""
        return str(self._loading.apply_renamings(name, self._renamings))

    def operations(self, pattern: str) -> str:
        """What a converter does, in transformers' words."""
        return ", ".join(map(repr, self._by_pattern[pattern].operations))

    def made_with(self, live: str, pattern: str) -> list[str]:
        """The weights that a converter makes, of which ``live`` is the first."""
        first, *others = self._by_pattern[pattern].target_patterns
        names = [live, *(live.replace(first, one) for one in others)]
        return [name for name in dict.fromkeys(names) if name in self.weights]

    def written(self, live: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The tensors, and their shapes, that ``save_pretrained`` makes of the weights ``live``."""
        state = {name: torch.empty(self.weights[name].shape, device="meta") for name in live}
        made = self._loading.revert_weight_conversion(self._model, state)
        return {name: tuple(value.shape) for name, value in made.items()}

    def convert(self, live: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights, ``live`` the first, that the loader makes of ``tensors``, which are in its order."""
        converter: Any = None
        for name, tensor in tensors.items():
            pattern = self._found[name][1]
            converter = converter or copy.deepcopy(self._by_pattern[str(pattern)])
            converter.add_tensor(live, name, pattern, tensor)
        made = converter.convert(live, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
