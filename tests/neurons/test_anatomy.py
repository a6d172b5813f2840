"""The rules of an anatomy, on headers made up here; what families compute is in ``test_families``."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

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
        assert anatomy.listed[0].reason == "experts of unknown orientation"
        assert len(anatomy.warnings) == 1
        assert "give them with [[axis=...]]" in anatomy.warnings[0]
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
def test_without_a_known_architecture_two_axes_count_as_out_in(config: dict[str, Any] | None) -> None:
    shapes = {
        "embed_tokens.weight": (9, 4),
        "lm_head.weight": (9, 4),
        "mlp.gate.weight": (3, 4),
        "linear.weight": (4, 3),
        "conv.weight": (4, 3, 2),
        "deep": (2, 2, 2, 2, 2),
        "experts.patch_embed.proj.weight": (4, 3, 2, 2),
        "mlp.experts.up_proj": (4, 3, 2),
    }
    anatomy = read_anatomy("rows", infos(shapes), config)
    assert {tensor.info.name: tensor.axes for tensor in anatomy.scored} == {"linear.weight": (0,)}
    assert reasons(anatomy) == {
        "embed_tokens.weight": "embedding",
        "lm_head.weight": "output head",
        "mlp.gate.weight": "router",
        "conv.weight": "a weight of an unknown layer (3 axes)",
        "deep": "a weight of an unknown layer (5 axes)",
        "experts.patch_embed.proj.weight": "a weight of an unknown layer (4 axes)",
        "mlp.experts.up_proj": "experts of unknown orientation",
    }
    unknown, experts, layers = anatomy.warnings
    assert "give the axes with [[axis=...]]" in unknown
    assert "[out, in" in unknown
    assert experts.startswith("1 tensors of experts are left out")
    assert layers.startswith("3 weights are left out")
    included = read_anatomy("rows", infos(shapes), config, include=["*"])
    assert "conv.weight" in reasons(included)
    stated = read_anatomy("rows", infos(shapes), config, axis={"conv*": 0, "*up_proj": (0, 1)})
    assert {"conv.weight", "mlp.experts.up_proj"} < set(names(stated))
    for name in ("ffn", "units"):
        with pytest.raises(MismatchError, match=name) as caught:
            read_anatomy(name, infos(shapes), config)
        assert "rows" in str(caught.value.hint)


def test_the_error_names_the_unknown_model_type() -> None:
    with pytest.raises(MismatchError, match="no-such-model"):
        read_anatomy("ffn", llama(1), {"model_type": "no-such-model"})


# Units


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


def test_the_module_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import neftsurgery.neurons.anatomy; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
