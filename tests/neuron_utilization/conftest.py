"""Fixtures of the utilization tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes_support import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from utilization_support import LINES

import neftsurgery as ns


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``tuned`` and ``patched`` Llamas in float64, a ``patch``, and a ``text``."""
    folder = tmp_path_factory.mktemp("utilization")
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
    ns.extract(
        folder / "base", folder / "tuned", anatomy="ffn", neurons="15%", score="l2",
        out=folder / "patch.safetensors",
    )  # fmt: skip
    ns.apply(folder / "base", folder / "patch.safetensors", out=folder / "patched")
    (folder / "text.txt").write_text("\n\n".join(LINES) + "\n")
    return folder
