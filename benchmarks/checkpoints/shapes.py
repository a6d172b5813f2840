"""What a checkpoint of a given size looks like: names, shapes, config. Writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
BF16 = 2  # bytes an element

# Geometries of real models: from this many bytes on, hidden size, feed-forward size, vocabulary.
GEOMETRIES = (
    (0, (256, 1024, 4_000)),
    (100e6, (1024, 4096, 32_000)),
    (1e9, (2048, 8192, 128_256)),  # Llama 3.2 1B
    (4e9, (4096, 14336, 128_256)),  # Llama 3.1 8B
    (40e9, (8192, 28672, 128_256)),  # Llama 3.1 70B
)


@dataclass(frozen=True)
class Model:
    """A model to write: its config.json and the shapes of its bf16 tensors, in file order."""

    config: dict[str, Any]
    tensors: dict[str, Shape]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(BF16 * math.prod(shape) for shape in self.tensors.values())


def llama(nbytes: float, geometry: tuple[int, int, int] | None = None) -> Model:
    """A Llama of about ``nbytes``: a real geometry, the nearest number of layers, tied embeddings."""
    hidden, ffn, vocabulary = geometry or next(g for least, g in reversed(GEOMETRIES) if nbytes >= least)
    layer = dict(_llama_layer(hidden, ffn))
    layer_bytes = BF16 * sum(map(math.prod, layer.values()))
    layers = max(1, round((nbytes - BF16 * vocabulary * hidden) / layer_bytes))
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        tensors |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    return Model(_config("llama", "LlamaForCausalLM", hidden, ffn, vocabulary, layers), tensors)


def deep_llama(nbytes: float, least_tensors: int) -> Model:
    """A Llama of small layers with at least ``least_tensors`` tensors: one for each of many shards."""
    hidden = 512
    while len((model := llama(nbytes, (hidden, 4 * hidden, 8_000))).tensors) < least_tensors and hidden > 16:
        hidden //= 2
    return model


def many_experts(count: int, width: int = 64) -> Model:
    """A mixture of small experts: ``count`` square matrices, or a few more, in a long header.

    They are in the order in which the safetensors package writes them.
    """
    hidden = ffn = width
    vocabulary, layers = 8_000, min(32, max(1, count // 100))
    experts = max(1, math.ceil((count / layers - 7) / 3))
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        prefix = f"model.layers.{number}."
        attention = (item for item in _llama_layer(hidden, ffn) if not item[0].startswith("mlp."))
        tensors |= {f"{prefix}{name}.weight": shape for name, shape in attention}
        tensors[f"{prefix}mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                tensors[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = shape
    tensors["model.norm.weight"] = (hidden,)
    config = _config("qwen3_moe", "Qwen3MoeForCausalLM", hidden, ffn, vocabulary, layers)
    config |= {"num_experts": experts, "moe_intermediate_size": ffn}
    return Model(config, dict(sorted(tensors.items())))


def _heads(hidden: int) -> tuple[int, int]:
    """Query heads, and the key and value heads that four of them share."""
    heads = max(4, hidden // 128)
    return heads, heads // 4


def _llama_layer(hidden: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    heads, shared = _heads(hidden)
    narrow = hidden // heads * shared
    yield "input_layernorm", (hidden,)
    yield "self_attn.q_proj", (hidden, hidden)
    yield "self_attn.k_proj", (narrow, hidden)
    yield "self_attn.v_proj", (narrow, hidden)
    yield "self_attn.o_proj", (hidden, hidden)
    yield "post_attention_layernorm", (hidden,)
    yield "mlp.gate_proj", (ffn, hidden)
    yield "mlp.up_proj", (ffn, hidden)
    yield "mlp.down_proj", (hidden, ffn)


def _config(
    model_type: str, architecture: str, hidden: int, ffn: int, vocabulary: int, layers: int
) -> dict[str, Any]:
    heads, shared = _heads(hidden)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": hidden // heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
