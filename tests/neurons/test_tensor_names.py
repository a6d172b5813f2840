"""Layer, kind and bias, from names and shapes; names by pattern."""

from __future__ import annotations

import time

import pytest
from test_anatomy import LLAMA, infos, llama

from neftsurgery.errors import UsageError
from neftsurgery.neurons.anatomy import read_anatomy
from neftsurgery.neurons.tensor_names import matching


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


def test_patterns_match_whole_names_and_case() -> None:
    for option in ({"include": ["embed_tokens"]}, {"only": ["MODEL*"]}, {"axis": {"layers": 0}}):
        with pytest.raises(UsageError, match="no tensor matches"):
            read_anatomy("rows", llama(1), LLAMA, **option)  # type: ignore[arg-type]


def test_thousands_of_plain_names_are_looked_up_not_searched() -> None:
    tensors = infos({f"layers.{n}.mlp.up_proj.weight": (2, 3) for n in range(20_000)})
    started = time.process_time()
    assert len(read_anatomy("rows", tensors, LLAMA, only=list(tensors)).scored) == 20_000
    assert time.process_time() - started < 5


def test_a_pattern_without_a_match_is_refused_where_it_names_an_option() -> None:
    assert matching(["*.x", "b"], {"a.x", "b", "c"}) == {"a.x", "b"}
    assert matching("a.x", {"a.x", "b"}) == {"a.x"}
    assert matching(["no"], {"a.x"}) == set()
    with pytest.raises(UsageError, match=r"no tensor matches include '\*\.y'"):
        matching(["a.x", "*.y"], {"a.x"}, option="include")
