"""Adapters over every option of PEFT's LoraConfig, each with what becomes of it when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
EQUAL = ""  # what a case that is read expects; any other expectation is a word of the refusal
LLAMA = ["q_proj", "o_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": LLAMA,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense"],
    "opt": ["fc1", "fc2", "k_proj"],
    "vit": ["projection"],  # the convolution of its patches
    "moe": ["q_proj"],
    "linear": ["0", "1", "2"],
    "conv1d": ["0", "1", "2"],
    "both": ["0", "1", "2"],
    "convolutions": ["0", "1", "2", "3"],
    "grouped": ["layers.0"],
    "embedding": ["0", "1"],
}


@dataclass(frozen=True)
class Case:
    """An adapter, and what becomes of it."""

    option: str  # the field of LoraConfig that it is about
    what: str
    expected: str = EQUAL
    model: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    edits: dict[str, Any] | None = None  # of the saved config
    config: dict[str, Any] | None = None  # of the base, where it is made of plain layers
    change: Callable[[Tensors], Tensors] | None = None  # of the saved factors
    train: bool = True  # whether the factors move after they are drawn

    def __str__(self) -> str:
        return f"{self.option}-{self.what}"


def case(option: str, value: Any, what: str = "", expected: str = EQUAL, **other: Any) -> Case:
    """One with ``option`` set to ``value`` when the adapter is made."""
    settings = {option: value} | other.pop("settings", {})
    return Case(option, what or str(value), expected, settings=settings, **other)


def edited(option: str, value: Any, what: str = "", expected: str = EQUAL, **other: Any) -> Case:
    """One with ``option`` set to ``value`` in the saved config."""
    return Case(option, f"edited-{what or value}", expected, edits={option: value}, **other)


def renamed(before: str, after: str, *, keep: bool) -> Callable[[Tensors], Tensors]:
    """A change of factors: another name for those with ``before`` in theirs; if ``after`` is empty, none."""

    def change(factors: Tensors) -> Tensors:
        moved = {name.replace(before, after): one.clone() for name, one in factors.items() if before in name}
        return {name: one for name, one in factors.items() if keep or before not in name} | (
            moved if after else {}
        )

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
MOVED, CONTRADICTS = "init_lora_weights", "contradicts itself"
LAYERED = {"target_modules": ["q_proj", "up_proj"]}

CASES = [
    # What every adapter has.
    *(
        Case("peft_type", f"lora-{model}", model=model)
        for model in TARGETS
        if model not in ("grouped", "embedding", "both")
    ),
    edited("peft_type", "IA3", expected="IA3"),
    edited("task_type", "CAUSAL_LM"),
    edited("auto_mapping", None),
    edited("peft_version", "0.99.0"),
    edited("base_model_name_or_path", "some/model"),
    edited("revision", "main"),
    edited("inference_mode", False),
    edited("runtime_config", {"ephemeral_gpu_offload": True}),
    edited("use_later_idea", {"x": 1}, expected="use_later_idea"),
    # Ranks and scales.
    *(case("r", rank) for rank in (1, 3, 16)),
    edited("r", 2, expected=CONTRADICTS),
    edited("r", 6, expected=CONTRADICTS),
    *(case("lora_alpha", alpha) for alpha in (1, 0, -4, 2.5)),
    edited("lora_alpha", 32),
    edited("lora_alpha", "much", expected="lora_alpha"),
    case("lora_dropout", 0.3),
    case("use_rslora", True),
    case(
        "use_rslora",
        True,
        "patterns",
        settings={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    edited("use_rslora", True),
    case("rank_pattern", {"q_proj": 2, "layers.1.mlp.up_proj": 9}, "plain"),
    case(
        "rank_pattern", {"^model.layers.0.self_attn.q_proj": 2, "^layers.1.self_attn.q_proj": 7}, "anchored"
    ),
    case("rank_pattern", {r".*layers\.[0]\..*(q|o)_proj": 2, r"layers\.\d+\.mlp\.up_proj": 5}, "regex"),
    edited("rank_pattern", {"q_proj": 2}, expected=CONTRADICTS),
    edited("rank_pattern", {"q.proj": 2}, "dot", expected=CONTRADICTS),
    edited("rank_pattern", {"k_proj": 2}, "elsewhere"),
    edited("rank_pattern", {"[q": 2}, "broken", expected="regular expression"),
    case("alpha_pattern", {"q_proj": 3, r"layers.1.mlp.up_proj": 64}, "plain"),
    case("alpha_pattern", {"q.proj": 3, "o_pro.": 5}, "dots"),
    case("alpha_pattern", {"proj": 3, "_proj": 5, "attn.q_proj": 7}, "no-boundary"),
    case("alpha_pattern", {r".*\.0\..*": 3, "q_proj": 5, r"(up|down)_proj": 7}, "first-wins"),
    case("alpha_pattern", {r"model\.layers\.[1-9]\.mlp\.(?!down).*": 3}, "lookahead"),
    case("alpha_pattern", {"^q_proj": 3, "^model.layers.1.self_attn.q_proj$": 5}, "anchored"),
    edited("alpha_pattern", {"(q_proj": 3}, "broken", expected="regular expression"),
    edited(
        "alpha_pattern",
        {f"layers.{i}.q_proj": 3 for i in range(100_000)},
        "100000",
        expected="too many patterns",
    ),
    # Which modules.
    case("target_modules", ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"], "paths"),
    case("target_modules", r".*layers\.\d+\.(self_attn|mlp)\.(q|up)_proj", "regex"),
    case("target_modules", "all-linear"),
    case("target_modules", None, "default"),
    case("target_modules", ["q_proj", "lm_head"], "head", "base_layer"),
    case("target_modules", ["q_proj", "embed_tokens"], "embedding", "embed_tokens"),
    case("target_modules", ["wte", "c_attn"], "wte", "lora_embedding", model="gpt2"),
    case("target_modules", ["0", "1"], "plain-embedding", "lora_embedding", model="embedding"),
    case("target_modules", ["0"], "grouped", "do not fit", model="grouped"),
    edited("target_modules", ["q_proj", "up_proj"], "fewer", expected=CONTRADICTS),
    edited("target_modules", [*LLAMA, "k_proj"], "more"),
    edited("target_modules", r".*(q|up)_proj", "regex-fewer", expected=CONTRADICTS),
    edited("target_modules", r".*\.(q|o|up|down)_proj", "regex-same"),
    edited("target_modules", r"(.*_proj", "broken", expected="regular expression"),
    edited("target_modules", ["proj"], "no-boundary", expected=CONTRADICTS),
    edited("target_modules", None, "none", expected=CONTRADICTS),
    edited("target_modules", 5, "number", expected="target_modules"),
    case("exclude_modules", ["layers.0.self_attn.q_proj", "up_proj"], "list"),
    case("exclude_modules", r".*layers\.0.*", "regex"),
    edited("exclude_modules", ["q_proj"], "list", expected=CONTRADICTS),
    edited("exclude_modules", r".*\.q_proj", "regex", expected=CONTRADICTS),
    edited("exclude_modules", r"q_proj", "regex-of-nothing"),
    case("layers_to_transform", 0, settings=LAYERED),
    case("layers_to_transform", [1], settings=LAYERED),
    case("layers_to_transform", [], settings=LAYERED),
    edited("layers_to_transform", 0, expected=CONTRADICTS),
    edited("layers_to_transform", [0, 1]),
    case("layers_pattern", "layers", settings=LAYERED | {"layers_to_transform": [1]}),
    case("layers_pattern", ["h", "layers"], settings=LAYERED | {"layers_to_transform": [1]}),
    case(
        "layers_pattern", "lay.*", "regex", "layers_pattern", settings=LAYERED | {"layers_to_transform": [1]}
    ),
    edited("layers_pattern", "", "empty"),
    edited("layers_pattern", "layers", "alone", expected="do not go with"),
    # What else the file of factors may hold.
    *(
        Case(
            "r",
            f"factors-{dtype}".replace("torch.", ""),
            change=lambda all, dtype=dtype: {k: v.to(dtype) for k, v in all.items()},
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ),
    Case("target_modules", "factors-missing", change=renamed(FIRST, "", keep=False)),
    case(MOVED, False, "factors-missing", "at random", change=renamed(FIRST, "", keep=False)),
    Case("target_modules", "factors-half", "missing", change=renamed(FIRST + "lora_A", "", keep=False)),
    Case(
        "target_modules",
        "factors-twice",
        CONTRADICTS,
        change=renamed("model.model.layers.0", "model.layers.0", keep=True),
    ),
    Case(
        "target_modules",
        "factors-elsewhere",
        "no such weight",
        change=renamed("layers.0", "layers.7", keep=False),
    ),
    Case(
        "target_modules",
        "factors-of-embedding",
        "embedding",
        change=lambda all: (
            all
            | {
                "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 16),
                "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(50, 4),
            }
        ),
    ),
    Case(
        "use_dora",
        "factors",
        "lora_magnitude_vector",
        change=lambda all: all | {FIRST + "lora_magnitude_vector": torch.ones(16)},
    ),
    case(
        "target_modules",
        ["q_proj", "lm_head"],
        "factors-of-head",
        change=renamed(".base_layer", "", keep=False),
    ),
    case(
        "target_modules",
        ["c_attn", "lm_head"],
        "factors-of-tied-head",
        "no such weight",
        model="gpt2",
        change=renamed(".base_layer", "", keep=False),
    ),
    # How weights are stored.
    case("fan_in_fan_out", True, "linear"),
    case("fan_in_fan_out", False, "gpt2", model="gpt2"),
    edited("fan_in_fan_out", True, "linear"),
    edited("fan_in_fan_out", False, "gpt2", model="gpt2"),
    *(case("fan_in_fan_out", True, f"square-{name}", model=name) for name in ("linear", "conv1d")),
    case("fan_in_fan_out", True, "square-alone", model="conv1d", settings={"target_modules": ["0"]}),
    case("fan_in_fan_out", True, "square-linear-alone", model="linear", settings={"target_modules": ["0"]}),
    *(
        case("fan_in_fan_out", flag, f"unknown-type-{name}", model=name, config={"model_type": "homemade"})
        for name, flag in (("linear", False), ("conv1d", True))
    ),
    Case("fan_in_fan_out", "square-both", "stored", "both"),
    case("target_modules", ["0", "2"], "square-and-linear", "stored", model="both"),
    edited("fan_in_fan_out", True, "alone", "stored", model="linear", settings={"target_modules": ["0"]}),
    edited("fan_in_fan_out", True, "square-linear", expected="stored", model="linear"),
    edited("fan_in_fan_out", False, "square-conv1d", expected="stored", model="conv1d"),
    # What else is trained.
    case("bias", "all", expected="biases", model="opt"),
    case("bias", "lora_only", expected="biases", model="opt"),
    case("modules_to_save", ["lm_head"], expected="modules_to_save"),
    case("modules_to_save", [], "empty"),
    case("trainable_token_indices", [1, 2], expected="trainable_token_indices"),
    case("lora_bias", True, expected="lora_bias", model="opt"),
    case("target_parameters", ["mlp.experts.gate_up_proj"], "experts", "target_parameters", model="moe"),
    case("layer_replication", [(0, 2), (1, 2)], "stack", "layer_replication"),
    case("ensure_weight_tying", True),
    case(
        "ensure_weight_tying",
        True,
        "embedding",
        "embed_tokens",
        settings={"target_modules": ["embed_tokens"]},
    ),
    # How the factors are drawn.
    *(case(MOVED, value) for value in (True, False, "gaussian", "eva", "orthogonal", "mica")),
    *(
        case(MOVED, value, f"{value}{'' if train else '-untrained'}", MOVED, train=train)
        for value in ("pissa", "pissa_niter_4", "olora")
        for train in (True, False)
    ),
    case(MOVED, "pissa", "converted", model="gpt2"),
    # These need data, other packages or an accelerator to begin with.
    *(edited(MOVED, value, expected=MOVED) for value in ("corda", "lora_ga", "loftq", "later")),
    edited("eva_config", {"rho": 2.0}),
    edited("corda_config", {"corda_method": "kpm"}),
    edited("lora_ga_config", {"direction": "ArB2r"}),
    edited("loftq_config", {"loftq_bits": 4, "loftq_iter": 1}),
    # Variants, which compute something else with the factors.
    case("use_dora", True, expected="use_dora"),
    case("use_qalora", True, expected="use_qalora"),
    case("qalora_group_size", 8),
    case("alora_invocation_tokens", [1, 2], expected="alora_invocation_tokens"),
    case("velora_config", {"num_groups": 4}, expected="velora_config"),
    case("kasa_config", {}, "kasa", "kasa_config"),
    edited("kasa_config", {}, "empty", expected="kasa_config"),
    case("monteclora_config", {"num_samples": 2}, expected="monteclora_config"),
    case("use_bdlora", {"target_modules_bd_b": LLAMA, "nblocks": 2}, "blocks", "use_bdlora"),
    edited("arrow_config", {"top_k": 1}, expected="arrow_config"),
    edited("megatron_config", {"hidden_size": 16}, expected="megatron_config"),
    edited("megatron_core", "megatron.core"),
]
