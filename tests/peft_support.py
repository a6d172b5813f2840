"""Tiny models of transformers that PEFT can adapt."""

from __future__ import annotations

import torch


def tiny(name: str) -> torch.nn.Module:
    """A model of transformers with random weights; layers of their own make nothing square but attention."""
    import transformers as t

    torch.manual_seed(0)
    if name == "llama":
        config = t.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        return t.LlamaForCausalLM(config)
    if name == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32))
    if name == "bert":
        config = t.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32,
        )  # fmt: skip
        return t.BertForMaskedLM(config)
    config = t.OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=40, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return t.OPTForCausalLM(config)
