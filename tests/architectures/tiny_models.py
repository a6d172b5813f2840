"""Every model type of the installed transformers, built small on the meta device.

Sizes are divided by one factor, counts stay, so that what divides what is as in the full model.
"""

from __future__ import annotations

import contextlib
import importlib
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
    "num_experts_per_tok": lambda config: 2,
    "prediction_length": lambda config: 4,
    "context_length": lambda config: 8,
    "vocabulary_map": lambda config: {"<image>": 8},
}
"""What a config may leave open, and its model class needs."""

_MAMBA = {"mamba_d_head": lambda config: config.mamba_expand * config.hidden_size // config.mamba_n_heads}
_NEEDED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": lambda config: 16},  # 14 do not divide its width
    "bamba": _MAMBA,
    "codegen": {"rotary_dim": lambda config: config.n_embd // config.n_head // 2},
    "cohere_compass_text": {
        "rope_parameters": lambda config: {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config.rope_theta": lambda config: 10000.0,  # it is not among the fields of its config
        "attn_config.clip_qkv": lambda config: 8.0,
    },
    "granite4_vision": {
        "deepstack_layer_map": lambda config: [[0, 0]],
        "downsample_rate": lambda config: "1/2",
    },
    "granitemoehybrid": _MAMBA,
    "deepseek_ocr2_text": {
        "mlp_layer_types": lambda config: ["dense", *["sparse"] * (config.num_hidden_layers - 1)]
    },
    "gemma3n_text": {"num_kv_shared_layers": lambda config: 0},
    "gptj": {"rotary_dim": lambda config: config.n_embd // config.n_head // 2},
    "lfm2_moe": {"layer_types": lambda config: (["conv", "full_attention"] * 3)[: config.num_hidden_layers]},
    "mamba2": {"head_dim": lambda config: config.expand * config.hidden_size // config.num_heads},
    "moonshine_streaming": {"num_key_value_heads": lambda config: config.num_attention_heads},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": lambda config: 2},
    "qwen3_omni_moe_talker_text": {
        "shared_expert_intermediate_size": lambda config: config.moe_intermediate_size
    },
    "qwen4_exp_text": {
        "indexer_n_heads": lambda config: 2,
        "indexer_kv_heads": lambda config: 1,
        "indexer_head_dim": lambda config: 8,
        "indexer_budget": lambda config: 8,
        "indexer_compress_ratio": lambda config: 2,
    },
    "vitmatte": {"fusion_hidden_sizes": lambda config: list(config.fusion_hidden_sizes)},
}
"""What the model class of a type needs at these sizes, or always; a dot leads into a nested config."""

_MOST_LAYERS_OF = {"zamba": 14, "zamba2": 14}
"""Their first layers have no attention, and no feed-forward block."""

__all__ = ["config_of", "classes_of", "model_types", "build"]

_ROUTING = {"n_group": 2, "num_expert_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
"""With few experts, at most so many groups and choices."""

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
    _shrink(config, factor, layers and _MOST_LAYERS_OF.get(model_type, layers), set())
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
        elif isinstance(value, int) and layers and value > _ROUTING.get(key, value):
            _set(config, key, _ROUTING[key])
        elif not _COUNTS.search(key):
            if isinstance(value, int):
                _set(config, key, _smaller(value, factor))
            elif isinstance(value, list) and value and all(type(item) is int for item in value):
                _set(config, key, [_smaller(item, factor) for item in value])
    for key, value in _STATED.items():
        with contextlib.suppress(Exception):
            if getattr(config, key, "") is None:
                _set(config, key, value(config))
    for key, value in _NEEDED.get(config.model_type, {}).items():
        path, _, last = key.rpartition(".")
        holder = getattr(config, path) if path else config
        with contextlib.suppress(Exception):
            _set(holder, last, value(config))
    _shrink_rotation(config)
    for key, value in values.items():  # one entry for each layer, as `layer_types` has
        if isinstance(value, list | tuple) and len(value) in depths and not key.startswith("_"):
            _set(config, key, value[: depths[len(value)]])


def _shrink_rotation(config: Any) -> None:
    """The angles of a head are divided among several axes: as many as the head has."""
    rotation = getattr(config, "rope_parameters", None)
    known = getattr(type(config), "ignore_keys_at_rope_validation", None) or ()
    if isinstance(rotation, dict) and "mrope_section" in known and "rope_type" in rotation:
        sections = rotation.get("mrope_section") or [1, 1, 1]
        with contextlib.suppress(Exception):
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            angles = int(head * rotation.get("partial_rotary_factor", 1.0)) // 2
            part = angles // len(sections)
            rotation["mrope_section"] = [angles - part * (len(sections) - 1), *[part] * (len(sections) - 1)]


def _smaller(value: int, factor: int) -> int:
    return value // factor if value % factor == 0 and value >= 4 * factor else value


def _set(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except Exception:  # a property, or a validator: it stays as it is
        return


def classes_of(model_type: str) -> list[type]:
    """The model classes that a config of this type is made for, the bare one first.

    They are those of the auto classes, else those of the modeling file.
    """
    found: dict[str, None] = {}
    tables = sorted(name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES"))
    for table in ["MODEL_MAPPING_NAMES", *tables]:
        names = getattr(modeling_auto, table).get(model_type, ()) if "CONFIG" not in table else ()
        found |= dict.fromkeys((names,) if isinstance(names, str) else names)
    classes = (getattr(transformers, name, None) for name in found if not _PLAIN.search(name))
    known = [
        one for one in classes if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)
    ]
    return known or _classes_beside(transformers.CONFIG_MAPPING[model_type])


def _classes_beside(config: type) -> list[type]:
    """The model classes of a config's modeling file, which no auto class names."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    models = [
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)
    ]
    return [
        one for one in models if one.config_class is config and not one.__name__.endswith("PreTrainedModel")
    ]


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
