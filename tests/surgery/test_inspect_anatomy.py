"""inspect --anatomy: parts, kinds of weight, what is left out, and which anatomies are offered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lossless_support import folder, tensor
from support import Result

import neftsurgery as ns
from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.surgery.inspect_anatomy import weight_kinds
from neftsurgery.tensors.header import TensorInfo

SHAPES = {
    "wte.weight": (50, 8),
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.mlp.c_fc.weight": (8, 32),
    "h.0.mlp.c_proj.weight": (32, 8),
}


def _model(path: Path, config: dict[str, object] | None, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Path:
    rng = np.random.default_rng(0)
    folder(path, {name: tensor("F32", shape, rng) for name, shape in shapes.items()})
    (path / "config.json").unlink(missing_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_flag_alone_tells_what_was_understood(neft: Callable[..., Result], tmp_path: Path) -> None:
    model = _model(tmp_path / "m", {"model_type": "gpt2", "n_head": 2})
    found = ns.inspect(model, anatomy="all")
    assert found.to_json() == {**neft("inspect", "m", "--anatomy", "--json").json, "name": str(model)}
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert kinds["h.*.mlp.c_fc.weight"]["neuron_axes"] == [1]
    assert kinds["h.*.mlp.c_proj.weight"]["role"] == "down"
    assert kinds["wte.weight"]["reason"] == "embedding"
    assert found["anatomies"]["ffn"] == {"tensors": 2, "neurons": 64}
    assert found["anatomies"]["units"] == {"tensors": 4, "neurons": 32 + 32 + 24 + 8, "units": 34}
    text = neft("inspect", "m", "--anatomy").out
    assert "left out    embedding (1)" in text
    assert "down (units take columns)" in text


def test_what_cannot_be_told_is_named_with_what_to_do(neft: Callable[..., Result], tmp_path: Path) -> None:
    named = neft("inspect", str(_model(tmp_path / "m", {"hidden_size": 8})), "--anatomy")
    assert named.code == 0
    assert "config.json names no model_type" in named.out
    assert "give the axes with --axis" in named.err
    other = neft(
        "inspect", str(_model(tmp_path / "o", {"model_type": "made-up"})), "--anatomy", "--json"
    ).json
    assert other["parts"] == [{"names": [""], "model_type": "made-up", "known": False}]
    assert "'made-up' is not known" in other["anatomies"]["units"]["why_not"]


def test_a_config_that_contradicts_the_tensors_is_named(neft: Callable[..., Result], tmp_path: Path) -> None:
    heads = neft("inspect", str(_model(tmp_path / "m", {"model_type": "gpt2", "n_head": 3})), "--anatomy")
    assert "24 neurons do not divide into 9 heads" in heads.err
    config = {"model_type": "gpt2", "n_head": 2, "hidden_size": 48}
    sizes = neft("inspect", str(_model(tmp_path / "s", config)), "--anatomy")
    assert "a hidden_size of 48, and no weight has an axis of that size" in sizes.err
    experts = {**SHAPES, "h.0.mlp.experts.w1": (4, 8, 8)}
    unknown = neft(
        "inspect", str(_model(tmp_path / "e", {"model_type": "gpt2", "n_head": 2}, experts)), "--anatomy"
    )
    assert "axes are not known: give them with --axis" in unknown.err


MOE = {
    "model.embed_tokens.weight": (100, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.{n}.self_attn.{p}_proj.weight": (8, 8) for n in range(2) for p in "qkvo"},
    **{f"model.layers.{n}.mlp.experts.{e}.up_proj.weight": (12, 8) for n in range(2) for e in range(3)},
    "model.layers.0.mlp.gate.weight": (3, 8),
    "model.layers.0.strange.kernel": (3, 3, 8, 8),
}
MOE_CONFIG = {"model_type": "qwen3_moe", "num_attention_heads": 4, "num_key_value_heads": 2}


def test_each_kind_says_role_axes_or_reason_and_counts_layers() -> None:
    infos = {name: TensorInfo(name, "F32", shape) for name, shape in MOE.items()}
    kinds = {kind.name: kind for kind in weight_kinds(read_anatomy("rows", infos, MOE_CONFIG), MOE_CONFIG)}
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
    assert sum(kind.tensors for kind in kinds.values()) == len(MOE) - 1
