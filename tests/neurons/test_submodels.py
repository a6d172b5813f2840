"""Nested configs, and their numbers of heads."""

from __future__ import annotations

from typing import Any

import pytest
from test_anatomy import LLAMA, infos, llama, names

from neftsurgery.neurons.anatomy import read_anatomy


def test_a_known_part_of_an_unknown_whole_is_read() -> None:
    config = {"model_type": "no-such-model", "text_config": LLAMA}
    tensors = infos({f"language_model.{name}": info.shape for name, info in llama(1).items()})
    assert read_anatomy("units", tensors, config).unit_count == 2 + 7
    tensors |= infos({"bridge.weight": (3, 4)})
    anatomy = read_anatomy("rows", tensors, config)
    assert "bridge.weight" in names(anatomy)
    assert "no-such-model" in anatomy.warnings[0]


def test_a_nested_config_that_omits_its_heads_has_those_of_its_class() -> None:
    tensors = infos({"language_model.layers.0.self_attn.k_proj.weight": (12, 5)})
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert read_anatomy("units", tensors, config).unit_count == 4
    for section in ({}, {"model_type": "gemma3"}):
        assert read_anatomy("units", tensors, {**config, "text_config": section}).unit_count == 4


@pytest.mark.parametrize("heads", [None, 0, -4, "4", 4.0, True, 3, 5])
def test_senseless_heads_leave_attention_out(heads: Any) -> None:
    anatomy = read_anatomy("units", llama(1), {**LLAMA, "num_attention_heads": heads})
    assert anatomy.unit_count == 7
    assert not any("self_attn" in name for name in names(anatomy))
    assert any("in no unit" in warning for warning in anatomy.warnings)


def test_a_composite_whose_text_values_are_not_nested() -> None:
    # As Qwen2-VL was published: text values at the top, the image tower under the same model_type.
    config = {
        "model_type": "qwen2_vl",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vision_config": {"model_type": "qwen2_vl", "num_heads": 3, "depth": 1},
    }
    tensors = llama(1) | infos(
        {"visual.blocks.0.attn.qkv.weight": (27, 9), "visual.blocks.0.mlp.fc1.weight": (5, 9)}
    )
    anatomy = read_anatomy("units", tensors, config)
    assert anatomy.unit_count == (2 + 7) + (3 + 5)
    assert not anatomy.warnings
    fused = next(tensor.units for tensor in anatomy.scored if "qkv" in tensor.info.name)
    assert fused is not None
    assert (fused.ids() - fused.ids()[0]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 3


def test_encoder_and_decoder_may_differ_in_heads() -> None:
    shapes = {f"model.{side}.layers.0.self_attn.k_proj.weight": (12, 5) for side in ("encoder", "decoder")}
    config = {"model_type": "bart", "encoder_attention_heads": 2, "decoder_attention_heads": 3}
    assert read_anatomy("units", infos(shapes), config).unit_count == 5


def test_configs_may_lie_in_each_other_and_omit_what_equals_the_default() -> None:
    shapes = {
        "model.vision_encoder.backbone.patch_embed.projection.weight": (6, 3, 7, 7),
        "vision_encoder.backbone.blocks.0.mlp.proj_in.weight": (8, 6),
        "vision_encoder.backbone.blocks.0.mlp.proj_out.weight": (6, 8),
    }
    stated = {"model_type": "sam2_vision_model", "backbone_config": {"model_type": "sam2_hiera_det_model"}}
    for config in ({"model_type": "sam2"}, {"model_type": "sam2", "vision_config": stated}):
        anatomy = read_anatomy("rows", infos(shapes), config)
        assert names(anatomy) == sorted(shapes)
        assert read_anatomy("units", infos(shapes), config).unit_count == 8


def test_hostile_nesting_is_read_to_a_depth() -> None:
    config: dict[str, Any] = LLAMA
    for _ in range(5000):
        config = {"model_type": "llava", "text_config": config}
    assert names(read_anatomy("rows", llama(1), config))
    for odd in ([], 7, "x", None, {"model_type": ["llama"]}, {"model_type": {"a": 1}}):
        read_anatomy("rows", llama(1), {"model_type": "llava", "text_config": odd, "vision_config": odd})
