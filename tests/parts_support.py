"""Folders made of several models, as diffusers and sentence-transformers save them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support import LLAMA_CONFIG, Arrays, llama, write_file, write_folder

UNET_CONFIG = {"_class_name": "UNet2DConditionModel", "block_out_channels": [8]}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "requires_safety_checker": True,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "LlamaModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
DENSE = "2_Dense/linear.weight"


def shifted(tensors: Arrays, by: float) -> dict[str, NDArray[np.generic]]:
    return {name: array + np.float32(by) for name, array in tensors.items()}


def unet() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    found = {f"down_blocks.{n}.attn.to_q.weight": rng.standard_normal((8, 4)) for n in range(2)}
    found |= {"conv_in.weight": rng.standard_normal((8, 4, 3, 3)), "conv_in.bias": rng.standard_normal(8)}
    return {name: array.astype(np.float32) for name, array in found.items()}


def text_encoder() -> dict[str, NDArray[np.float32]]:
    return llama(32, 64, 2, 40, seed=2)


def write_pipeline(folder: Path, by: float = 0.0, shards: int = 2) -> Path:
    """A pipeline of a UNet and a text encoder of so many shards; ``by`` is added to their tensors."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(PIPELINE))
    (folder / "README.md").write_text("a pipeline")
    for part, name in (("scheduler", "scheduler_config.json"), ("unet", "config.json")):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(UNET_CONFIG))
    write_file(folder / "unet" / "diffusion_pytorch_model.safetensors", shifted(unet(), by))
    write_folder(folder / "text_encoder", shifted(text_encoder(), by), shards, config=dict(LLAMA_CONFIG))
    return folder


def write_sentence_transformer(folder: Path, by: float = 0.0) -> Path:
    """A transformer in the folder itself, and a dense layer in ``2_Dense``; ``by`` is added to its weight."""
    write_folder(folder, text_encoder(), config=dict(LLAMA_CONFIG))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    for part in ("1_Pooling", "2_Dense", "3_Normalize"):
        (folder / part).mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 32, "out_features": 6}')
    dense = {"linear.weight": np.arange(192, dtype=np.float32).reshape(6, 32) + np.float32(by)}
    write_file(folder / "2_Dense" / "model.safetensors", dense)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
