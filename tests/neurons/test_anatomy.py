"""The rules of an anatomy, on headers made up here; what families compute is in ``test_families``."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neftsurgery.errors import MismatchError, UsageError
from neftsurgery.neurons.anatomy import Anatomy, read_anatomy
from neftsurgery.tensors.header import TensorInfo

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


def infos(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape) for name, shape in shapes.items()}


def llama(
    layers: int = 2, heads: int = 4, kv: int = 2, head: int = 5, inner: int = 7
) -> dict[str, TensorInfo]:
    """Llama's names, hidden size 6."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 6), "lm_head.weight": (11, 6)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (heads * head, 6),
            f"{at}.self_attn.q_proj.bias": (heads * head,),
            f"{at}.self_attn.k_proj.weight": (kv * head, 6),
            f"{at}.self_attn.v_proj.weight": (kv * head, 6),
            f"{at}.self_attn.o_proj.weight": (6, heads * head),
            f"{at}.mlp.gate_proj.weight": (inner, 6),
            f"{at}.mlp.up_proj.weight": (inner, 6),
            f"{at}.mlp.down_proj.weight": (6, inner),
            f"{at}.input_layernorm.weight": (6,),
        }
    return infos(shapes)


def names(anatomy: Anatomy) -> list[str]:
    return [tensor.info.name for tensor in anatomy.scored]


def reasons(anatomy: Anatomy) -> dict[str, str]:
    return {entry.info.name: entry.reason for entry in anatomy.listed}


# What is scored


def test_every_tensor_is_scored_or_listed_once_and_both_are_sorted() -> None:
    tensors = llama()
    for name in ("rows", "ffn", "units"):
        anatomy = read_anatomy(name, dict(reversed(tensors.items())), LLAMA)
        listed = [entry.info.name for entry in anatomy.listed]
        assert names(anatomy) == sorted(names(anatomy))
        assert listed == sorted(listed)
        assert sorted(names(anatomy) + listed) == sorted(tensors)


def test_rows_leave_out_embeddings_head_and_norms() -> None:
    anatomy = read_anatomy("rows", llama(1), LLAMA)
    assert reasons(anatomy) == {
        "lm_head.weight": "output head",
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.input_layernorm.weight": "norm",
        "model.layers.0.self_attn.q_proj.bias": "bias",
    }
    axes = {entry.info.name: entry.axes for entry in anatomy.listed}
    assert (
        axes["model.layers.0.input_layernorm.weight"] == axes["model.layers.0.self_attn.q_proj.bias"] == (0,)
    )
    assert axes["lm_head.weight"] is axes["model.embed_tokens.weight"] is None
    assert {tensor.axes for tensor in anatomy.scored} == {(0,)}
    assert not anatomy.warnings


def test_layer_kind_and_bias_of_a_tensor() -> None:
    found = {tensor.info.name: tensor for tensor in read_anatomy("rows", llama(1), LLAMA).scored}
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert (query.layer, query.kind) == ("model.layers.0", "self_attn.q_proj")
    assert query.bias == "model.layers.0.self_attn.q_proj.bias"
    assert found["model.layers.0.self_attn.k_proj.weight"].bias is None


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", "mlp.up_proj"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3", "mlp.experts.*.up_proj"),
        ("decoder.block.0.layer.1.EncDecAttention.k.weight", "decoder.block.0", "layer.1.EncDecAttention.k"),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3", "mlp.experts.gate_up_proj"),
        ("classifier.weight", "", "classifier"),
        ("visual.merger.mlp.2.weight", "visual.merger.mlp.2", "visual.merger.mlp"),
        ("weight", "", "weight"),
        ("0.weight", "0", ""),
    ],
)
def test_layer_and_kind_of_a_name(name: str, layer: str, kind: str) -> None:
    (tensor,) = read_anatomy("rows", infos({name: (3, 4)}), None).scored
    assert (tensor.layer, tensor.kind) == (layer, kind)


def test_a_square_column_tensor_has_no_bias_of_its_own() -> None:
    shapes = {"h.0.mlp.c_proj.weight": (6, 6), "h.0.mlp.c_proj.bias": (6,)}
    config = {"model_type": "gpt2", "n_head": 2}
    (row,) = read_anatomy("rows", infos(shapes), config).scored
    assert (row.axes, row.bias) == ((1,), "h.0.mlp.c_proj.bias")
    for name in ("ffn", "units"):
        (column,) = read_anatomy(name, infos(shapes), config).scored
        assert (column.axes, column.bias) == ((0,), None)


def test_a_bias_of_another_size_is_none() -> None:
    shapes = {"layers.0.mlp.up_proj.weight": (4, 6), "layers.0.mlp.up_proj.bias": (6,)}
    assert read_anatomy("rows", infos(shapes), LLAMA).scored[0].bias is None


def test_ffn_marks_the_up_half_of_fused_tensors() -> None:
    phi = read_anatomy("ffn", infos({"layers.0.mlp.gate_up_proj.weight": (6, 5)}), {"model_type": "phi3"})
    assert phi.scored[0].part is not None
    assert phi.scored[0].part.mask().tolist() == [False] * 3 + [True] * 3
    experts = infos(
        {"layers.0.mlp.experts.gate_up_proj": (2, 5, 6), "layers.0.mlp.experts.down_proj": (2, 3, 5)}
    )
    down, up = read_anatomy("ffn", experts, {"model_type": "gpt_oss"}).scored
    assert (down.axes, down.part, up.axes) == ((0, 1), None, (0, 2))
    assert up.part is not None
    assert up.part.mask().tolist() == [False, True] * 6
    odd = infos({"layers.0.mlp.gate_up_proj.weight": (7, 5)})
    assert not read_anatomy("ffn", odd, {"model_type": "phi3"}).scored


def test_vectors_of_one_element_are_listed_with_their_axes() -> None:
    shapes = {"a.weight": (5, 1), "b.weight": (5,), "c.weight": (), "d.weight": (3, 0), "e.bias": (2, 3)}
    anatomy = read_anatomy("rows", infos(shapes), None)
    assert not anatomy.scored
    assert not anatomy.warnings
    assert [(entry.info.name, entry.reason, entry.axes) for entry in anatomy.listed] == [
        ("a.weight", "one element wide", (0,)),
        ("b.weight", "one element wide", (0,)),
        ("c.weight", "one element wide", ()),
        ("d.weight", "no elements", None),
        ("e.bias", "bias", (0, 1)),
    ]


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [("I64", "integer"), ("BOOL", "bool"), ("C64", "complex"), ("F4", "quantized: F4 elements are codes")],
)
def test_what_is_not_a_float_is_listed(dtype: str, reason: str) -> None:
    anatomy = read_anatomy("rows", infos({"a.weight": (4, 4)}, dtype), None, include=["*"])
    (entry,) = anatomy.listed
    assert (entry.reason, entry.axes, entry.included) == (reason, None, True)


# Patterns


def test_include_adds_rows_and_exclude_wins() -> None:
    anatomy = read_anatomy(
        "rows", llama(1), LLAMA, include=["*embed*", "lm_head*", "*norm*"], exclude=["lm_*"]
    )
    added = next(tensor for tensor in anatomy.scored if tensor.info.name == "model.embed_tokens.weight")
    assert added.axes == (0,)
    by_name = {entry.info.name: entry for entry in anatomy.listed}
    assert (by_name["lm_head.weight"].reason, by_name["lm_head.weight"].included) == ("excluded", False)
    norm = by_name["model.layers.0.input_layernorm.weight"]
    assert (norm.axes, norm.included) == ((0,), True)


def test_exclude_takes_away_what_no_option_may_choose() -> None:
    anatomy = read_anatomy("rows", llama(1), LLAMA, exclude=["*.bias", "*.mlp.*", "matches-nothing"])
    bias = next(entry for entry in anatomy.listed if entry.info.name.endswith("bias"))
    assert (bias.reason, bias.axes) == ("excluded", None)
    assert not any("mlp" in name for name in names(anatomy))


def test_only_keeps_what_it_names_and_includes_nothing() -> None:
    anatomy = read_anatomy("rows", llama(2), LLAMA, only=["*.0.mlp.up_proj.weight", "lm_head.weight"])
    assert names(anatomy) == ["model.layers.0.mlp.up_proj.weight"]
    assert reasons(anatomy)["lm_head.weight"] == "output head"


def test_patterns_match_whole_names_and_case() -> None:
    for option in ({"include": ["embed_tokens"]}, {"only": ["MODEL*"]}, {"axis": {"layers": 0}}):
        with pytest.raises(UsageError, match="no tensor matches"):
            read_anatomy("rows", llama(1), LLAMA, **option)  # type: ignore[arg-type]


def test_axis_overrides_and_the_last_match_wins() -> None:
    tensors = infos({"a.kernel": (3, 4), "b.kernel": (3, 4), "c.weight": (3, 4)})
    anatomy = read_anatomy("rows", tensors, None, axis=[("*.kernel", (1,)), ("b.*", (0,))])
    assert {tensor.info.name: tensor.axes for tensor in anatomy.scored} == {
        "a.kernel": (1,),
        "b.kernel": (0,),
        "c.weight": (0,),
    }
    stated = read_anatomy("rows", tensors, None, axis={"*": 1})
    assert {tensor.axes for tensor in stated.scored} == {(1,)}
    assert not stated.warnings
    known = read_anatomy("rows", llama(1), LLAMA, axis={"*": [1]})
    assert {tensor.axes for tensor in known.scored} == {(1,)}
    assert "lm_head.weight" in reasons(known)


@pytest.mark.parametrize("axes", [(2,), (0, 2), (1, 0), (0, 0), (-1,), (), (True,), ("0",)])
def test_bad_axes_are_refused(axes: Any) -> None:
    with pytest.raises(UsageError, match="axis"):
        read_anatomy("rows", infos({"a.weight": (3, 4), "a.bias": (3,)}), None, axis={"*": axes})


def test_an_axis_out_of_range_names_the_tensor() -> None:
    with pytest.raises(UsageError, match=r"x\.weight.*\[3, 4\]"):
        read_anatomy("rows", infos({"x.weight": (3, 4)}), None, axis={"x*": (2,)})


def test_experts_count_only_where_their_axes_are_known() -> None:
    tensors = infos(
        {"layers.0.mlp.experts.gate_up_proj": (2, 6, 10), "layers.0.mlp.experts.down_proj": (2, 5, 6)}
    )
    for config in (None, {"model_type": "qwen3_vl_moe_text"}, {"model_type": "llama"}):
        anatomy = read_anatomy("rows", tensors, config, include=["*gate_up_proj"])
        assert not anatomy.scored
        assert "--axis" in anatomy.listed[0].reason
        assert len(anatomy.warnings) == 1
        assert "--axis" in anatomy.warnings[0]
        stated = read_anatomy("rows", tensors, config, axis={"*.experts.*": (0, 2)})
        assert [tensor.axes for tensor in stated.scored] == [(0, 2), (0, 2)]
        assert not stated.warnings
    moe = {"model_type": "qwen3_vl_moe_text"}
    stated = read_anatomy("ffn", tensors, moe, axis={"*gate_up_proj": (0, 2), "*down_proj": (0, 1)})
    assert [tensor.part and tensor.part.count for tensor in stated.scored] == [None, 10]


def test_an_unknown_anatomy_is_refused() -> None:
    with pytest.raises(UsageError, match="columns"):
        read_anatomy("columns", llama(1), LLAMA)


# Configs


@pytest.mark.parametrize("config", [None, {}, {"model_type": 7}, {"model_type": "no-such-model"}])
def test_without_a_known_architecture_weights_count_as_out_in(config: dict[str, Any] | None) -> None:
    shapes = {
        "embed_tokens.weight": (9, 4),
        "conv.weight": (4, 3, 2),
        "deep": (2, 2, 2, 2, 2),
        "six": (1,) * 5 + (2,),
    }
    anatomy = read_anatomy("rows", infos(shapes), config)
    assert {tensor.info.name: tensor.axes for tensor in anatomy.scored} == {
        "embed_tokens.weight": (0,),
        "conv.weight": (0,),
        "deep": (0,),
    }
    (warning,) = anatomy.warnings
    assert "--axis" in warning
    assert "[out, in" in warning
    for name in ("ffn", "units"):
        with pytest.raises(MismatchError, match=name) as caught:
            read_anatomy(name, infos(shapes), config)
        assert "rows" in str(caught.value.hint)


def test_the_error_names_the_unknown_model_type() -> None:
    with pytest.raises(MismatchError, match="no-such-model"):
        read_anatomy("ffn", llama(1), {"model_type": "no-such-model"})


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


# Units


def test_units_of_a_llama_layer() -> None:
    anatomy = read_anatomy("units", llama(1), LLAMA)
    ids = {tensor.kind: tensor.units.ids().tolist() for tensor in anatomy.scored if tensor.units is not None}
    assert ids == {
        "mlp.down_proj": list(range(7)),
        "mlp.gate_proj": list(range(7)),
        "mlp.up_proj": list(range(7)),
        "self_attn.k_proj": [7] * 5 + [8] * 5,
        "self_attn.o_proj": [7] * 10 + [8] * 10,
        "self_attn.q_proj": [7] * 10 + [8] * 10,
        "self_attn.v_proj": [7] * 5 + [8] * 5,
    }
    assert anatomy.unit_count == 9


def test_included_tensors_are_units_of_one_neuron() -> None:
    anatomy = read_anatomy("units", llama(1), LLAMA, include=["lm_head.weight"])
    head = anatomy.scored[0]
    assert head.units is not None
    assert head.units.ids().tolist() == list(range(11))
    assert anatomy.unit_count == 11 + 9


@given(
    layers=st.integers(1, 12),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    head=st.integers(1, 3),
    inner=st.integers(1, 4),
    missing=st.sets(
        st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])
    ),
    include=st.booleans(),
)
def test_units_are_numbered_in_the_order_of_first_members(
    layers: int, kv: int, group: int, head: int, inner: int, missing: set[str], include: bool
) -> None:
    tensors = {
        name: info
        for name, info in llama(layers, kv * group, kv, head, inner).items()
        if not any(part in name for part in missing)
    }
    config = {"model_type": "llama", "num_attention_heads": kv * group, "num_key_value_heads": kv}
    anatomy = read_anatomy("units", tensors, config, include=["lm_head.weight"] if include else [])
    members: dict[int, tuple[str, int]] = {}
    for tensor in anatomy.scored:
        assert tensor.units is not None
        assert len(tensor.units) == tensor.layout.count
        for index, unit in enumerate(tensor.units.ids().tolist()):
            members[unit] = min(members.get(unit, (tensor.info.name, index)), (tensor.info.name, index))
    assert sorted(members) == list(range(anatomy.unit_count))
    assert [members[unit] for unit in sorted(members)] == sorted(members.values())


def test_blocks_that_do_not_match_are_refused() -> None:
    tensors = infos({"layers.0.mlp.up_proj.weight": (4, 6), "layers.0.mlp.down_proj.weight": (6, 5)})
    with pytest.raises(MismatchError, match=r"up_proj.*down_proj") as caught:
        read_anatomy("units", tensors, LLAMA)
    assert (caught.value.expected, caught.value.found) == (5, 4)
    assert len(read_anatomy("ffn", tensors, LLAMA).scored) == 2


# Quantized files


@pytest.mark.parametrize(
    ("codes", "dtype", "companion", "other"),
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
def test_codes_and_their_companions_are_left_out(codes: str, dtype: str, companion: str, other: str) -> None:
    tensors = {
        codes: TensorInfo(codes, dtype, (4, 6)),
        companion: TensorInfo(companion, other, (4, 2)),
        "b.weight": TensorInfo("b.weight", "BF16", (4, 6)),
    }
    anatomy = read_anatomy("rows", tensors, LLAMA)
    assert names(anatomy) == ["b.weight"]
    assert reasons(anatomy)[companion] == f"quantized: belongs to {codes}"
    if "quant_state" not in companion:
        assert companion in reasons(anatomy)[codes]
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


# Size


def test_a_mixture_of_64000_tensors_is_read_quickly_and_small() -> None:
    tensors = infos(
        {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (7168, 2048)
            if name[0] == "d"
            else (2048, 7168)
            for layer in range(84)
            for expert in range(256)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
    )
    config = {"model_type": "qwen3_moe", "num_attention_heads": 4}
    started = time.process_time()
    anatomy = read_anatomy("units", tensors, config)
    assert time.process_time() - started < 5  # about 1.1 s
    assert anatomy.unit_count == 84 * 256 * 2048
    tracemalloc.start()
    read_anatomy("units", dict(list(tensors.items())[:6000]), config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 2048  # less than a byte a neuron
    last = anatomy.scored[-1].units
    assert last is not None
    assert np.array_equal(last.ids(), np.arange(2048) + int(last.ids()[0]))


def test_thousands_of_plain_names_are_looked_up_not_searched() -> None:
    tensors = infos({f"layers.{n}.mlp.up_proj.weight": (2, 3) for n in range(20_000)})
    started = time.process_time()
    assert len(read_anatomy("rows", tensors, LLAMA, only=list(tensors)).scored) == 20_000
    assert time.process_time() - started < 5


def test_the_module_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import neftsurgery.neurons.anatomy; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
