"""A small sharded Llama checkpoint in bfloat16, and a fine-tune whose changed neurons are known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..sources.resolve import INDEX_NAME
from ..tensors.floats import narrow, widen
from ..tensors.header import TensorInfo
from ..tensors.writer import written_file

#: How many neurons the synthetic fine-tune changes.
PLANTED = 64
_SHARDS = 3
_LAYER = {
    "input_layernorm": (256,),
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (704, 256),
    "mlp.up_proj": (704, 256),
    "mlp.down_proj": (256, 704),
    "post_attention_layernorm": (256,),
}
_SHAPES = {
    "model.embed_tokens.weight": (2000, 256),
    **{f"model.layers.{n}.{name}.weight": shape for n in range(4) for name, shape in _LAYER.items()},
    "model.norm.weight": (256,),
    "lm_head.weight": (2000, 256),
}

Arrays: TypeAlias = dict[str, NDArray[np.float32]]


def make_base(folder: Path, seed: int = 0) -> Arrays:
    """Write the base checkpoint; returns its weights, rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in _SHAPES.items():
        drawn = np.ones(shape) if len(shape) == 1 else 0.02 * rng.standard_normal(shape)
        weights[name] = _round(drawn.astype(np.float32))
    _write(folder, weights)
    return weights


def planted(seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """The neurons that the synthetic fine-tune changes: per tensor, ascending output rows."""
    rng = np.random.default_rng(seed + 1)
    shapes = ((name, shape) for name, shape in _SHAPES.items() if ".layers." in name and len(shape) == 2)
    rows = [(name, row) for name, shape in shapes for row in range(shape[0])]
    chosen: dict[str, list[int]] = {}
    for number in sorted(rng.choice(len(rows), PLANTED, replace=False).tolist()):
        name, row = rows[number]
        chosen.setdefault(name, []).append(row)
    return {name: np.array(index) for name, index in sorted(chosen.items())}


def make_tuned(folder: Path, base: Mapping[str, NDArray[np.float32]], seed: int = 0) -> None:
    """Write a synthetic fine-tune of ``base``: slight noise, and much more of it in the `planted` neurons."""
    rng = np.random.default_rng(seed + 2)
    moved = planted(seed)
    tuned = {}
    for name, weight in base.items():
        scale = np.full(weight.shape[:1] + (1,) * (weight.ndim - 1), 2e-4, np.float32)
        scale[moved.get(name, np.empty(0, np.int64))] = 4e-3
        noise = rng.standard_normal(weight.shape).astype(np.float32)
        tuned[name] = _round(weight if weight.ndim == 1 else weight + scale * noise)
    _write(folder, tuned)


def _round(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the nearest bfloat16; the result is still float32."""
    return widen(narrow(values, "BF16"), "BF16").astype(np.float32)


def _write(folder: Path, weights: Arrays) -> None:
    folder.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("planted.json"), folder / "config.json")
    (folder / "README.md").write_text("Random weights, made by `neftsurgery demo`.\n")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(np.array_split(list(weights), _SHARDS), 1):
        part = names.tolist()
        file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        entries = [TensorInfo(name, "BF16", weights[name].shape) for name in part]
        with written_file(entries, {"format": "pt"}, folder / file) as written:
            for name in part:
                written.write(name, 0, narrow(weights[name], "BF16"))
            written.finish({"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 2 * sum(w.size for w in weights.values())}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
