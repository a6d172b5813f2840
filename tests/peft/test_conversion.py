"""Adapters as patches and patches as adapters: PEFT merges to what `apply` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    ViTConfig,
    ViTModel,
)

import neftsurgery as ns
from neftsurgery.errors import CorruptFileError, UsageError
from neftsurgery.peft.config import NeftConfig

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16()
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))
    elif kind == "mixtral":  # its files have a tensor for each expert
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, vocab_size=64))
    elif kind == "nomic":  # a tensor of its files is the weights of three layers
        model = NomicBertModel(NomicBertConfig(**sizes, vocab_size=64))
    else:  # its files have other names than the live model
        model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    model.save_pretrained(folder)
    return load(kind, folder)


def load(kind: str, folder: Path) -> Any:
    return (AutoModel if kind in ("nomic", "vit") else AutoModelForCausalLM).from_pretrained(
        folder, dtype="auto"
    )


def trained_adapter(model: Any, folder: Path) -> Any:
    model = get_peft_model(model, NeftConfig(neurons="10%"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "nomic", "vit"])
def test_an_adapter_is_a_patch(kind: str, tmp_path: Path) -> None:
    model = trained_adapter(make(kind, tmp_path / "base"), tmp_path / "adapter")
    patch = ns.Patch.from_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "patch.safetensors")
    assert patch.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    merged = model.merge_and_unload().state_dict()
    for name, value in load(kind, tmp_path / "patched").state_dict().items():
        assert torch.equal(value, merged[name]), name
    assert ns.verify(tmp_path / "base", patch).state == "base"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "nomic", "vit"])
def test_a_patch_is_an_adapter(kind: str, tmp_path: Path) -> None:
    trained_adapter(make(kind, tmp_path / "base"), tmp_path / "first")
    patch = ns.Patch.from_adapter(tmp_path / "first", tmp_path / "base", tmp_path / "patch.safetensors")
    patch.to_adapter(tmp_path / "adapter", tmp_path / "base")
    ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    loaded = PeftModel.from_pretrained(load(kind, tmp_path / "base"), tmp_path / "adapter")
    merged = loaded.merge_and_unload().state_dict()
    for name, value in load(kind, tmp_path / "patched").state_dict().items():
        assert torch.equal(value, merged[name]), name
    again = ns.Patch.from_adapter(tmp_path / "adapter", tmp_path / "base")
    assert again.tensors.keys() == patch.tensors.keys()
    for name in patch.tensors:
        assert (again.index(name) == patch.index(name)).all()
        assert (again.values(name) == patch.values(name)).all()


def test_what_is_not_an_adapter_of_this_method_is_refused(tmp_path: Path) -> None:
    model = make("llama", tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="another method"):
        ns.Patch.from_adapter(tmp_path / "lora", tmp_path / "base")
    with pytest.raises(UsageError, match="not the folder"):
        ns.Patch.from_adapter(tmp_path / "base", tmp_path / "base")
    trained_adapter(load("llama", tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CorruptFileError):
        ns.Patch.from_adapter(tmp_path / "adapter", tmp_path / "base")
    assert not (tmp_path / "patch.safetensors").exists()
