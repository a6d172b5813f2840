"""Codes and their scales are left out, and only they."""

from __future__ import annotations

import pytest
from test_anatomy import LLAMA, infos, names, reasons

from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.tensors.header import TensorInfo


@pytest.mark.parametrize(
    ("codes", "dtype", "scale", "other"),
    [
        ("a.weight", "F8_E4M3", "a.weight_scale_inv", "F32"),
        ("a.weight", "F8_E4M3", "a.weight_scale", "BF16"),
        ("a.qweight", "I32", "a.scales", "F16"),
        ("a.qweight", "I32", "a.qzeros", "I32"),
        ("a.weight", "U8", "a.weight.absmax", "F32"),
        ("a.weight", "U8", "a.weight.quant_state.bitsandbytes__nf4", "U8"),
        ("a.weight", "I8", "a.SCB", "F32"),
        ("a.weight_packed", "I32", "a.weight_scale", "BF16"),
        ("experts.gate_up_proj_blocks", "U8", "experts.gate_up_proj_scales", "U8"),
        ("experts.gate_up_proj", "F8_E4M3", "experts.gate_up_proj_scale_inv", "F32"),
        ("a.weight", "U32", "a.scales", "BF16"),
    ],
)
def test_codes_and_their_scales_are_left_out(codes: str, dtype: str, scale: str, other: str) -> None:
    tensors = {
        codes: TensorInfo(codes, dtype, (4, 6)),
        scale: TensorInfo(scale, other, (4, 2)),
        "b.weight": TensorInfo("b.weight", "BF16", (4, 6)),
    }
    anatomy = read_anatomy("rows", tensors, LLAMA)
    assert names(anatomy) == ["b.weight"]
    assert reasons(anatomy)[scale] == f"quantized: belongs to {codes}"
    if "quant_state" not in scale:
        assert scale in reasons(anatomy)[codes]
        assert reasons(anatomy)[codes].startswith("quantized: ")
        assert any("quantized" in warning for warning in anatomy.warnings)


def test_eight_bit_floats_are_codes_only_where_something_says_so() -> None:
    tensors = infos({"a.weight": (4, 6)}, "F8_E4M3") | infos({"b.weight": (4, 6)})
    assert names(read_anatomy("rows", tensors, LLAMA)) == ["a.weight", "b.weight"]
    for config in (
        {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
        {"model_type": "gemma3", "text_config": {**LLAMA, "quantization_config": {"quant_method": "fp8"}}},
    ):
        anatomy = read_anatomy("rows", tensors, config)
        assert names(anatomy) == ["b.weight"]
        assert "fp8" in reasons(anatomy)["a.weight"]


def test_scales_beside_plain_weights_do_not_hide_them() -> None:
    tensors = infos({"a.weight": (4, 6), "a.input_scale": (1,)})
    assert names(read_anatomy("rows", tensors, LLAMA)) == ["a.weight"]
