"""Kinds of weight: what is said of tensors whose names differ in numbers alone."""

from __future__ import annotations

from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.neurons.kinds import weight_kinds
from neftsurgery.tensors.header import TensorInfo

SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.{n}.self_attn.{p}_proj.weight": (8, 8) for n in range(2) for p in "qkvo"},
    **{f"model.layers.{n}.mlp.experts.{e}.up_proj.weight": (12, 8) for n in range(2) for e in range(3)},
    "model.layers.0.mlp.gate.weight": (3, 8),
    "model.layers.0.strange.kernel": (3, 3, 8, 8),
}
CONFIG = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2}


def test_each_kind_says_role_axes_or_reason_and_counts_layers() -> None:
    infos = {name: TensorInfo(name, "F32", shape) for name, shape in SHAPES.items()}
    kinds = {kind.name: kind for kind in weight_kinds(read_anatomy("rows", infos, CONFIG), CONFIG)}
    assert "model.norm.weight" not in kinds
    up = kinds["model.layers.*.mlp.experts.*.up_proj.weight"]
    assert (up.role, up.axes, up.tensors, up.layers) == (
        "expert up", (0,), 6, {"model.layers.0", "model.layers.1"},
    )  # fmt: skip
    assert (up.part, up.shapes, up.by_columns) == ("qwen3_moe", {(12, 8)}, False)
    assert kinds["model.layers.*.self_attn.o_proj.weight"].by_columns
    assert kinds["model.embed_tokens.weight"].reason == "embedding"
    assert kinds["model.layers.*.mlp.gate.weight"].axes is None
    assert kinds["model.layers.*.mlp.gate.weight"].role == "router"
    assert "not a linear or convolution" in kinds["model.layers.*.strange.kernel"].reason
    assert sum(kind.tensors for kind in kinds.values()) == len(SHAPES) - 1
