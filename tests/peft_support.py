"""Tiny models of transformers, and of plain torch layers, that PEFT can adapt."""

from __future__ import annotations

import torch


def tiny(name: str) -> torch.nn.Module:
    """A model with random weights, the same at each call. Of transformers' ones, only attention is square."""
    import transformers as t

    torch.manual_seed(0)
    if name in _LAYERS:
        return _Layers(*_LAYERS[name]())
    if name == "llama":
        config = t.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )  # fmt: skip
        return t.LlamaForCausalLM(config)
    if name == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32, **ends)
        return t.GPT2LMHeadModel(config)
    if name == "bert":
        config = t.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32,
        )  # fmt: skip
        return t.BertForMaskedLM(config)
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            image_size=8, patch_size=4,
        )  # fmt: skip
        return t.ViTForImageClassification(config)
    if name == "moe":
        config = t.MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=32,
        )  # fmt: skip
        return t.MixtralForCausalLM(config)
    config = t.OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=40, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return t.OPTForCausalLM(config)


class _Layers(torch.nn.Module):
    """Layers of a model that no table of architectures knows: ``layers.0`` and so on."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _conv1d(*sizes: tuple[int, int]) -> list[torch.nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return [Conv1D(outputs, inputs) for inputs, outputs in sizes]


_LAYERS = {
    "linear": lambda: [torch.nn.Linear(16, 16), torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)],
    "conv1d": lambda: _conv1d((16, 16), (16, 24), (24, 16)),  # GPT-2's: weights stored [in, out]
    "both": lambda: [*_conv1d((16, 16), (16, 24)), torch.nn.Linear(24, 16)],
    "convolutions": lambda: [
        torch.nn.Conv1d(4, 6, 3), torch.nn.Conv2d(4, 6, 3),
        torch.nn.Conv2d(6, 4, 1), torch.nn.Conv3d(4, 6, 2),
    ],
    "grouped": lambda: [torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Linear(8, 4)],
    "embedding": lambda: [torch.nn.Embedding(30, 16), torch.nn.Linear(16, 24)],
}  # fmt: skip
