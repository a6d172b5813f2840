"""From the tensor names in a checkpoint's files to the parameter names of the live model.

Most models keep their names. Where transformers renames tensors as it loads them (GPT-NeoX, ViT), or adds
or drops the ``base_model_prefix``, this module calls transformers' own renaming function, so the answer is
the loader's. Where transformers merges, splits or transposes tensors (most mixtures of experts), the model
has no neurons that correspond to those of the file, and this is an error. Nothing is guessed.

`_Renaming` is the only class that uses transformers' private modules.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import MismatchError
from ..neurons.submodels import split_part

__all__ = ["live_names"]


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The parameter of ``model`` that each tensor of the files becomes; an error unless each has its own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    renaming = _Renaming(model, parameters) if _is_transformers(model) else None
    found: dict[str, str] = {}
    for name in names:
        plain = name if name in parameters else split_part(name)[1]  # a part is attached by itself
        live = plain if renaming is None else renaming.live(plain)
        if live not in parameters:
            raise MismatchError(
                "the model has no such weight",
                tensor=name,
                expected=live if live != name else None,
                found=_similar(live, parameters),
                hint="use the tensor names of the checkpoint that the model was loaded from",
            )
        found[name] = live
    taken: dict[str, str] = {}
    for name, live in found.items():
        if (other := taken.setdefault(live, name)) != name:
            raise MismatchError(
                f"this tensor and {other} are the same weight of the model",
                tensor=name,
                found=live,
                hint="choose neurons of only one of the two",
            )
    return found


def _similar(name: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """Some names with the same ending as ``name``, or the first names of all."""
    for parts in (3, 2):
        ending = ".".join(name.split(".")[-parts:])
        if same := [other for other in parameters if other.endswith(ending)]:
            return ", ".join(same[:2])
    return ", ".join(list(parameters)[:2]) or "a model without parameters"


def _is_transformers(model: nn.Module) -> bool:
    """Whether transformers' loading rules apply to ``model``. Does not import transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


class _Renaming:
    """How ``from_pretrained`` renames tensors, by transformers' own functions."""

    def __init__(self, model: Any, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._prefix: str = model.base_model_prefix
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            # The conversions that loading used; for a model that was never loaded, those it would use.
            used = getattr(model, "_weight_conversions", None)
            mapping = get_model_conversion_mapping(model) if used is None else copy.deepcopy(used)
            self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
            if len(self._renamings) + len(self._converters) != len(mapping):
                raise TypeError("a conversion of an unknown kind")
            self._rename = rename_source_key
            self.live("weight")  # fails here, not later, if the function's signature has changed
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise MismatchError(
                f"cannot tell how this version of transformers renames a model's weights: {error}",
                hint="use a version of transformers that neftsurgery was tested with (see pyproject.toml)",
            ) from error

    def live(self, name: str) -> str:
        """The parameter that tensor ``name`` becomes; an error if it is merged, split or transposed."""
        live, converted = self._rename(
            name, self._renamings, self._converters, self._prefix, self._parameters
        )
        if live not in self._parameters and name in self._parameters:  # as the loader does
            live, converted = self._rename(name, [], [], self._prefix, self._parameters)
        if converted is not None:
            raise MismatchError(
                "transformers merges, splits or transposes this tensor when it loads the file, "
                "so the model does not have its neurons",
                tensor=name,
                found=f"loaded as {live}",
                hint="choose neurons of other tensors",
            )
        return str(live)
