"""A patch's neurons by layer and kind."""

from __future__ import annotations

from hub_support import patch_of

from neftsurgery.hub.layer_counts import LayerCounts


def test_layers_in_order_and_the_most_frequent_kind_first(llama):
    found = LayerCounts.of_patch(llama)
    assert found.kinds == ["mlp.down_proj", "mlp.up_proj"]
    assert found.layers == [(f"model.layers.{layer}",) * 2 for layer in range(3)]
    assert found.counts == [[2, 1], [3, 2], [4, 3]]
    assert found.totals == [3, 5, 7]


def test_neighbouring_layers_and_rare_kinds_are_put_together(tmp_path):
    counts = {f"h.{layer}.kind{kind}.weight": 1 + kind for layer in range(100) for kind in range(12)}
    found = LayerCounts.of_patch(patch_of(tmp_path / "p.safetensors", counts | {"wte.weight": 3}))
    assert found.kinds == [*(f"kind{kind}" for kind in range(11, 4, -1)), None]
    assert found.layers[:2] == [("h.0", "h.2"), ("h.3", "h.5")]
    assert found.layers[-2:] == [("h.99", "h.99"), ("", "")]
    assert list(found.counts[0]) == [3 * (1 + kind) for kind in range(11, 4, -1)] + [3 * 15]
    assert sum(found.totals) == sum(counts.values()) + 3
