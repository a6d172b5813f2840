"""What PEFT cannot adapt, or not exactly, is named; what is left, it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from architectures.tiny_models import config_of
from peft_support import tiny

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.live.lora_places import PeftPlaces
from neftsurgery.surgery.lora_modules import LoraPlaces, adapter_config, lora_modules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_moe() -> Any:
    experts = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(vocab_size=40, num_key_value_heads=2, **experts, **SMALL))


def qwen3_moe() -> Any:
    experts = {"num_experts": 4, "moe_intermediate_size": 12, "mlp_only_layers": [0], "head_dim": 8}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(vocab_size=40, num_key_value_heads=2, **experts, **SMALL))


def siglip() -> Any:
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(image_size=16, patch_size=8, **SMALL))


def mamba() -> Any:
    return tf.MambaModel(tf.MambaConfig(vocab_size=30, hidden_size=16, state_size=4, num_hidden_layers=2))


def opt() -> Any:
    return tiny("opt")


def patched(make: Any, tmp_path: Path, **more: Any) -> tuple[Path, ns.Patch]:
    """A base, and a patch of a fifth of each of its tensors."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    options: dict[str, Any] = {"neurons": "20%", "policy": "random", "per": "tensor", "include": ["*"]}
    sides = tmp_path / "base", tmp_path / "tuned"
    return sides[0], ns.extract(*sides, out=tmp_path / "p", **options | more)


REFUSED = {
    "tied": (opt, "model.decoder.embed_tokens.weight", "tied to lm_head.weight"),
    "another forward pass": (opt, "model.decoder.embed_positions.weight", "weight of a OPTLearnedPositional"),
    "read outside": (siglip, "embeddings.position_embedding.weight", "weight of a Embedding"),
    "attention": (siglip, "head.attention.out_proj.weight", "NonDynamicallyQuantizableLinear"),
    "a parameter": (siglip, "head.attention.in_proj_weight", "in_proj_weight of a MultiheadAttention"),
    "grouped": (mamba, "layers.0.mixer.conv1d.weight", "weight of a Conv1d"),
    "mamba": (mamba, "layers.0.mixer.out_proj.weight", "weight of a Linear"),
    "router": (qwen2_moe, "model.layers.0.mlp.gate.weight", "weight of a Qwen2MoeTopKRouter"),
}


@pytest.mark.parametrize(("make", "name", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_exact_is_refused_by_name(tmp_path: Path, make: Any, name: str, why: str) -> None:
    base, patch = patched(make, tmp_path)
    places = PeftPlaces(Checkpoint.open(base), patch).places
    found = next(place for tensor, place in places.items() if tensor.endswith(name))
    assert isinstance(found, str)
    assert why in found
    with pytest.raises(ns.MismatchError, match=r"has no LoRA form[\s\S]*exclude") as caught:
        ns.export_lora(patch, tmp_path / "adapter", base=base)
    assert isinstance(places[str(caught.value.tensor)], str)
    assert not (tmp_path / "adapter").exists()


def test_names_that_peft_takes_for_stacked_experts_are_targeted_as_parameters(tmp_path: Path) -> None:
    """Of a layer of Qwen3-MoE without experts: as modules, PEFT drops them without a word."""
    base, patch = patched(qwen3_moe, tmp_path, only=["*layers.0.mlp.*"])
    model = PeftPlaces(Checkpoint.open(base), patch)
    places = model.places
    assert {place.form for found in places.values() for place in found} == {"parameter"}
    assert len(places) == 3
    take(model, patch, places)
    modules = {name: [replace(place, form="linear")] for name, (place,) in places.items()}
    with pytest.raises(ns.MismatchError, match="PEFT does not take this adapter"):
        take(PeftPlaces(Checkpoint.open(base), patch), patch, modules)


def take(model: PeftPlaces, patch: ns.Patch, places: LoraPlaces) -> None:
    """Have the adapter of ``patch`` checked, whatever is right."""
    modules = [replace(module, rank=module.count) for module in lora_modules(patch, places)]
    model.check(adapter_config(modules, None, None), [one for m in modules for one in m.entries("F32")])


def test_modules_whose_names_end_alike_are_not_adapted(tmp_path: Path) -> None:
    """Idefics has ``layers.0.self_attn`` and ``vision_model.encoder.layers.0.self_attn``."""
    config = config_of("idefics", 16, 1)
    config.vocab_size = 40
    base, patch = patched(lambda: tf.IdeficsModel(config), tmp_path, only=["layers.0.self_attn.q_proj*"])
    ns.export_lora(patch, tmp_path / "adapter", base=base)
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert found["target_modules"] == ["layers.0.self_attn.q_proj"]
    assert found["exclude_modules"] == ["vision_model.encoder.layers.0.self_attn.q_proj"]
    model = peft.PeftModel.from_pretrained(tf.IdeficsModel.from_pretrained(base), tmp_path / "adapter")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["base_model.model.layers.0.self_attn.q_proj"]


def test_the_check_names_what_is_lost_and_what_is_missing(tmp_path: Path) -> None:
    base, patch = patched(lambda: tiny("llama"), tmp_path, only=["*up_proj*"])
    places = PeftPlaces(Checkpoint.open(base), patch).places
    moved = {
        name: [replace(place, path=place.path.replace("up_proj", "down_proj"))]
        for name, (place,) in places.items()
    }
    with pytest.raises(ns.MismatchError, match="size mismatch"):
        take(PeftPlaces(Checkpoint.open(base), patch), patch, moved)
    model = PeftPlaces(Checkpoint.open(base), patch)
    modules = [replace(module, rank=module.count) for module in lora_modules(patch, places)]
    entries = [one for m in modules for one in m.entries("F32")]
    with pytest.raises(ns.MismatchError, match=r"layers.0.mlp.up_proj.lora_A.\S*weight is missing"):
        model.check(adapter_config(modules, None, None), entries[1:])
