"""Every model type of the installed transformers, built small on the meta device.

Sizes are divided by one factor, counts stay, so that what divides what is as in the full model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

_STATED = {
    "num_key_value_heads": lambda config: config.num_attention_heads,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
    "vocab_size": lambda config: 128,
    "n_routed_experts": lambda config: _MOST_EXPERTS,
    "n_shared_experts": lambda config: 1,
    "prediction_length": lambda config: 4,
    "context_length": lambda config: 8,
    "vocabulary_map": lambda config: {"<image>": 8},
}
"""What a config may leave open, and its model class needs."""

__all__ = ["config_of", "classes_of", "model_types", "build"]

LADDER = ((32, 5), (16, 5), (8, 5), (4, 5), (2, 5), (1, 5), (1, 0))
"""Factors of sizes, and most layers (0: all), the smallest first: the first that can be built is used."""

_COUNTS = re.compile(
    r"token|vocab|image_size|position|length|patch|sampl|rate|chunk|window|^num_|^n_(?!embd|inner)|heads|layers|depth|bucket|"
    r"stride|kernel|index|indices|resolution|crop|max_|groups|dilation|_in_channels|bins|reduction|ratio|experts|topk|top_k"
)
_LAYERS = re.compile(r"(^|_)(num_layers|layers|n_layers?|num_hidden_layers|num_blocks|depth)$")
_EXPERTS = re.compile(r"(^|_)(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$")
_MOST_EXPERTS = 8
_PLAIN = re.compile(
    r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForNextSentence|Backbone$"
)
"""Classes that add linear layers alone."""


def model_types() -> list[str]:
    """All of them, sorted."""
    return sorted(transformers.CONFIG_MAPPING)


def config_of(model_type: str, factor: int, layers: int) -> Any:
    """A config whose sizes are divided by ``factor``, with at most ``layers`` layers."""
    config = transformers.CONFIG_MAPPING[model_type]()
    _shrink(config, factor, layers, set())
    return config


def _shrink(config: Any, factor: int, layers: int, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    values = dict(vars(config))
    depths = {}
    for key, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            if value.model_type == "timm_backbone":  # a package of its own
                value = transformers.ResNetConfig(out_indices=list(value.out_indices or [4]))
                _set(config, key, value)
            _shrink(value, factor, layers, seen)
        elif key.startswith("_") or isinstance(value, bool):
            continue
        elif isinstance(value, int) and layers and _LAYERS.search(key) and value > layers:
            depths[value] = layers
            _set(config, key, layers)
        elif isinstance(value, int) and _EXPERTS.search(key) and value > _MOST_EXPERTS and layers:
            _set(config, key, _MOST_EXPERTS)
        elif not _COUNTS.search(key):
            if isinstance(value, int):
                _set(config, key, _smaller(value, factor))
            elif isinstance(value, list) and value and all(type(item) is int for item in value):
                _set(config, key, [_smaller(item, factor) for item in value])
    for key, value in _STATED.items():
        with contextlib.suppress(Exception):
            if getattr(config, key, "") is None:
                _set(config, key, value(config))
    for key, value in values.items():  # one entry for each layer, as `layer_types` has
        if isinstance(value, list | tuple) and len(value) in depths and not key.startswith("_"):
            _set(config, key, value[: depths[len(value)]])


def _smaller(value: int, factor: int) -> int:
    return value // factor if value % factor == 0 and value >= 4 * factor else value


def _set(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except Exception:  # a property, or a validator: it stays as it is
        return


def classes_of(model_type: str) -> list[type]:
    """The model classes that a config of this type is made for, the bare one first."""
    found: dict[str, None] = {}
    tables = sorted(name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES"))
    for table in ["MODEL_MAPPING_NAMES", *tables]:
        names = getattr(modeling_auto, table).get(model_type, ()) if "CONFIG" not in table else ()
        found |= dict.fromkeys((names,) if isinstance(names, str) else names)
    classes = (getattr(transformers, name, None) for name in found if not _PLAIN.search(name))
    return [one for one in classes if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)]


def build(model_type: str, ladder: Sequence[tuple[int, int]] = LADDER) -> Iterator[tuple[str, Any, str]]:
    """Each class of ``model_type``: its name, a model on the meta device, or None and the reason."""
    classes = classes_of(model_type)
    for cls in classes:
        reason = ""
        for factor, layers in ladder:
            try:
                config = config_of(model_type, factor, layers)
                with torch.device("meta"):
                    model = cls(config)
                break
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
        else:
            yield cls.__name__, None, reason
            continue
        yield cls.__name__, model.eval(), ""
    if not classes:
        yield "", None, "no model class of its own"
