"""Which unit each neuron belongs to, and which neurons count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_anatomy import LLAMA, infos, llama

from neftsurgery.errors import MismatchError
from neftsurgery.neurons.anatomy import read_anatomy


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
