"""What becomes of the tensors of files: what the rules say is what ``from_pretrained`` does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn
from tuning_support import bert, gpt2, llama, opt, select

import neftsurgery as ns
from neftsurgery.live.loading_rules import LoadingRules

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def neox() -> nn.Module:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(vocab_size=50, **SMALL))


def vit() -> nn.Module:
    return tf.ViTModel(tf.ViTConfig(image_size=32, patch_size=8, **SMALL))


def mixtral() -> nn.Module:
    config = tf.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=2, **SMALL)
    return tf.MixtralForCausalLM(config)


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    )


# How the files are made, and the class that loads them.
LOADED: dict[str, tuple[Any, Any]] = {
    "llama": (llama, tf.LlamaForCausalLM),
    "llama, base files into a head model": (lambda: llama().model, tf.LlamaForCausalLM),
    "llama, head files into a base model": (llama, tf.LlamaModel),
    "gpt2": (gpt2, tf.GPT2LMHeadModel),
    "gpt2, base files into a head model": (lambda: gpt2().transformer, tf.GPT2LMHeadModel),
    "gpt2, head files into a base model": (gpt2, tf.GPT2Model),
    "bert, base files into a head model": (lambda: bert().bert, tf.BertForMaskedLM),
    "bert, head files into another head": (bert, tf.BertForSequenceClassification),
    "opt": (opt, tf.OPTForCausalLM),
    "neox": (neox, tf.GPTNeoXForCausalLM),
    "vit": (vit, tf.ViTModel),
    "t5": (t5, tf.T5ForConditionalGeneration),
    "mixtral": (mixtral, tf.MixtralForCausalLM),
}


@pytest.mark.parametrize(("make", "cls"), LOADED.values(), ids=LOADED)
def test_the_loader_is_right(tmp_path: Path, make: Any, cls: Any) -> None:
    """Each tensor of the files is filled with its own number; that number's parameter is the live name."""
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for number, (name, tensor) in enumerate(sorted(tensors.items()), 1):
        tensors[name] = torch.full_like(tensor, number)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = cls.from_pretrained(tmp_path)
    homes: dict[float, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        values = parameter.detach().unique()
        if len(values) == 1:
            homes.setdefault(float(values), set()).add(name)
    found = {number: _live(model, name) for number, name in enumerate(sorted(tensors), 1)}
    assert sum(live is not None for live in found.values()) >= 8
    for number, live in found.items():
        assert live in homes[number] if live is not None else number not in homes


def _live(model: nn.Module, name: str) -> str | None:
    try:
        live, converter = LoadingRules(model).find(name)
    except ns.MismatchError:
        return None
    return live if converter is None else None


def test_merged_experts_have_a_converter_and_the_rest_has_not() -> None:
    rules = LoadingRules(mixtral())
    live, converter = rules.find("model.layers.0.block_sparse_moe.experts.0.w1.weight")
    assert live == "model.layers.0.mlp.experts.gate_up_proj"
    assert converter is not None
    assert rules.operations(converter) == "MergeModulelist(dim=0), Concatenate(dim=1)"
    assert rules.find("model.layers.0.self_attn.q_proj.weight")[1] is None
    gate = rules.find("model.layers.0.block_sparse_moe.gate.weight")
    assert gate == ("model.layers.0.mlp.gate.weight", None)


def test_a_model_that_was_never_loaded() -> None:
    """Loading would rename its files' tensors, so their names are understood."""
    assert LoadingRules(neox()).find("embed_out.weight") == ("lm_head.weight", None)


def test_a_plain_module_has_plain_names() -> None:
    rules = LoadingRules(nn.Sequential(nn.Linear(2, 3)))
    assert rules.find("0.weight") == ("0.weight", None)
    with pytest.raises(ns.MismatchError, match="no such weight") as caught:
        rules.find("model.0.weight")
    assert "0.weight" in str(caught.value)


def test_a_transformers_that_is_not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, not guessed, even though the names may well be equal."""
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(ns.MismatchError, match="this version of transformers"):
        LoadingRules(llama())


def test_training_under_other_names(tmp_path: Path) -> None:
    """From files of the base class into a model with a head, and back into the files."""
    gpt2().transformer.save_pretrained(tmp_path / "base")
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    selection = select(
        model,
        {"transformer.h.0.mlp.c_fc.weight": ([1], [1, 2])},
        names=lambda live: live.removeprefix("transformer."),
    )
    attached = ns.attach(model, selection)
    with torch.no_grad():
        next(attached.parameters()).mul_(2)
    attached.refresh()
    attached.patch(tmp_path / "patch").close()
    ns.apply(tmp_path / "base", tmp_path / "patch", out=tmp_path / "patched")
    ids = torch.arange(3, 12).unsqueeze(0)
    again = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "patched")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
