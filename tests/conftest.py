"""What all tests share: real data where it is at hand, and writers of checkpoints that are independent of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"

Arrays = Mapping[str, NDArray[np.generic]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints, text and malformed files beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED.name}: it lies beside the repository, not in it")
    return SHARED


def write_file(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint of one file, written by the safetensors package."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, metadata)
    path.chmod(0o644)
    return path


def write_folder(folder: Path, tensors: Arrays, shards: int = 1, config: dict[str, object] | None = None) -> Path:
    """A checkpoint folder: one file, or ``shards`` files with an index; tensors dealt round."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        write_file(folder / name, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _llama(hidden: int, ffn: int, layers: int, vocabulary: int, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> NDArray[np.float32]:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden), "lm_head.weight": weight(vocabulary, hidden)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            tensors[f"{prefix}{name}.weight"] = weight(*shape)
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    return tensors


LLAMA_CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


@pytest.fixture
def llama_arrays() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """Makes the float32 tensors of a small Llama: ``llama_arrays(hidden=32, ffn=48, layers=2, ...)``."""

    def make(
        hidden: int = 32, ffn: int = 48, layers: int = 2, vocabulary: int = 40, seed: int = 0
    ) -> dict[str, NDArray[np.float32]]:
        return _llama(hidden, ffn, layers, vocabulary, seed)

    return make
