"""Support for tests of live models: small models, selections made by hand, and bits to compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import neftsurgery as ns
from neftsurgery.neurons.layout import Layout
from neftsurgery.selection.selection import Chosen
from neftsurgery.tensors.header import TensorInfo

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Picks = Mapping[str, tuple[Sequence[int], Sequence[int]]]


def select(model: nn.Module, picks: Picks, kind: str | None = None, names: Any = lambda name: name) -> Any:
    """A selection of live tensors: name to (neuron axes, neurons); ``names`` makes the file's names."""
    tensors = {}
    for live, (axes, index) in picks.items():
        weight, name = model.get_parameter(live), names(live)
        info = TensorInfo(name, kind or KINDS[weight.dtype], tuple(weight.shape))
        tensors[name] = Chosen(info, Layout.of(weight.shape, axes), np.array(index, np.int64))
    return ns.Selection(dict(sorted(tensors.items())), {"score": "by hand"})


def vectors(tensor: Tensor, axes: Sequence[int], index: Sequence[int]) -> Tensor:
    """The neurons' vectors ``[k, width]``, by definition."""
    rest = [axis for axis in range(tensor.dim()) if axis not in axes]
    count = math.prod(tensor.shape[axis] for axis in axes)
    return tensor.permute(*axes, *rest).reshape(count, -1)[list(index)]


def put(tensor: Tensor, axes: Sequence[int], index: Sequence[int], values: Tensor) -> None:
    """Write the neurons' vectors: `vectors` inverted."""
    rest = [axis for axis in range(tensor.dim()) if axis not in axes]
    view = tensor.detach().permute(*axes, *rest)
    places = np.unravel_index(list(index), [tensor.shape[axis] for axis in axes])
    for row, place in zip(values.detach(), zip(*places, strict=True), strict=True):
        view[tuple(int(n) for n in place)] = row.view(view.shape[len(axes) :])


def others(tensor: Tensor, axes: Sequence[int], index: Sequence[int]) -> Tensor:
    """The vectors that are not chosen."""
    count = math.prod(tensor.shape[axis] for axis in axes)
    return vectors(tensor, axes, [n for n in range(count) if n not in set(index)])


def bits(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, bytes]]:
    """A state dict as its names, types, shapes and bytes, in order."""
    return {
        name: (
            (t.dtype, tuple(t.shape)),
            t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, t in state.items()
    }


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the entries of trainable neurons."""
    return {name: tensor for name, tensor in model.state_dict().items() if "_neurons_" not in name}


MORE = {"initializer_range": 0.3}  # with the usual one, the gradients of so small a model are rounding errors


def llama(**more: Any) -> LlamaForCausalLM:
    options = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**options | more)).eval()


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    more = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=layers, n_head=2, n_positions=32, **more)
    ).eval()


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    } | MORE
    return BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | MORE
    return OPTForCausalLM(
        OPTConfig(vocab_size=50, word_embed_proj_dim=16, max_position_embeddings=32, **sizes)
    ).eval()


FAMILIES: dict[str, tuple[Any, Picks]] = {
    "llama": (
        llama,
        {
            "model.layers.0.mlp.up_proj.weight": ([0], [1, 5, 7, 23]),
            "model.layers.0.mlp.down_proj.weight": ([1], [0, 5, 7, 22]),
            "model.layers.1.self_attn.k_proj.weight": ([0], [3]),
            "model.layers.1.self_attn.o_proj.weight": ([1], [4, 5, 6]),
            "lm_head.weight": ([0], [2, 49]),
        },
    ),
    "gpt2": (
        gpt2,
        {
            "transformer.h.0.attn.c_attn.weight": ([1], [0, 17, 40]),
            "transformer.h.0.attn.c_attn.bias": ([0], [0, 9, 40]),  # a key's has no gradient
            "transformer.h.1.mlp.c_fc.weight": ([1], [3, 63]),
            "transformer.h.1.mlp.c_proj.weight": ([0], [3, 63]),
            "transformer.wte.weight": ([0], [4, 5, 48]),  # tied to lm_head
        },
    ),
    "bert": (
        bert,
        {
            "bert.encoder.layer.0.intermediate.dense.weight": ([0], [0, 23]),
            "bert.encoder.layer.0.intermediate.dense.bias": ([0], [0, 1, 23]),
            "bert.encoder.layer.1.output.dense.weight": ([1], [2, 3]),
            "bert.encoder.layer.1.output.dense.bias": ([0], [9]),
        },
    ),
    "opt": (
        opt,
        {
            "model.decoder.layers.0.fc1.weight": ([0], [1, 2]),
            "model.decoder.layers.1.fc2.weight": ([1], [1, 2]),
            "model.decoder.layers.1.self_attn.q_proj.bias": ([0], [15]),
        },
    ),
}  # fmt: skip


def batch(seed: int = 0, size: int = 2, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (size, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def saved(model: Any, folder: Path) -> Any:
    """The model, saved to ``folder`` and loaded from it."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype="auto").eval()


def rows_of(attached: ns.Attached, live: str) -> nn.Parameter:
    """The trainable values of a live weight."""
    (found,) = [p for name, p in attached.named_parameters() if name.startswith(f"{live}_neurons_")]
    return found


def train(model: nn.Module, attached: ns.Attached, steps: int, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(attached.parameters(), **options)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
    return optimizer
