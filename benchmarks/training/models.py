"""The model that all contestants train: a Llama or Qwen3-MoE with random weights. Needs torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.training.options import EXPERTS, SHAPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(job: dict[str, Any]) -> Any:
    """The model, frozen, in training mode, on its device."""
    hidden, ffn, heads, kv, vocabulary = SHAPES[job["shape"]]
    experts, visited = EXPERTS.get(job["shape"], (0, 0))
    more: dict[str, Any] = {}
    if experts:
        more = {"num_experts": experts, "num_experts_per_tok": visited, "moe_intermediate_size": ffn}
        more |= {"head_dim": hidden // heads, "experts_implementation": "grouped_mm"}
    config = (Qwen3MoeConfig if experts else LlamaConfig)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=job["layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=max(64, job["length"]),
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job["dtype"]])  # so that no wider copy ever exists
    try:
        with torch.device(job["device"]):
            model: Any = (Qwen3MoeForCausalLM if experts else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)
    if job["checkpointing"]:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train().requires_grad_(False)


def batch(job: dict[str, Any]) -> Tensor:
    """Token ids ``[batch, length]``, the same for every contestant."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[job["shape"]][4]
    ids = torch.randint(vocabulary, (job["batch"], job["length"]), generator=generator)
    return ids.to(job["device"])


def linears(model: Any) -> dict[str, nn.Linear]:
    """The modules whose weights are trained: all linear layers except the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEAR
    }
