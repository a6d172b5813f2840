"""The numbers of the layer map."""

from __future__ import annotations

import numpy as np
import pytest
from report_support import best, read
from support import LLAMA_CONFIG, write_folder

import neftsurgery as ns
from neftsurgery.reporting.layer_map import NO_LAYER, LayerMap


def test_the_map(told, scores):
    score, *_, tensor, _, _, _ = read(scores)
    chosen = best(score, round(0.05 * len(score)))
    rows = told["figures"]["map"]["rows"]
    assert len(rows) == len(set(tensor))
    for row in rows:
        mine = tensor == f"{row['layer']}.{row['kind']}.weight"
        assert (row["chosen"], row["total"]) == (chosen[mine].sum(), mine.sum())
        assert row["share"] == pytest.approx(chosen[mine].mean())
    assert told["sections"][0]["selected"] == chosen.sum()


def test_scores_and_patch_agree_with_a_count_by_hand(pair, tmp_path):
    scores = ns.diff(*pair)
    selection = scores.select(neurons="10%")
    patch = ns.extract(*pair, selection, out=tmp_path / "p.safetensors")
    whole, part = LayerMap.of_scores(scores, selection), LayerMap.of_patch(patch)
    assert whole.layers == ("model.layers.0", "model.layers.1")
    assert len(whole.kinds) == 7
    for i, layer in enumerate(whole.layers):
        for j, kind in enumerate(whole.kinds):
            name = f"{layer}.{kind}.weight"
            assert whole.totals[i, j] == scores.tensors[name].info.shape[0]
            assert whole.chosen[i, j] == len(
                selection.tensors[name].index if name in selection.tensors else ()
            )
    assert whole.neurons == part.neurons == selection.neurons
    assert whole.total == scores.neurons
    cells = {(layer, kind): (taken, there) for layer, kind, taken, there, _ in whole.rows()}
    for layer, kind, taken, there, _ in part.rows():
        assert cells[layer, kind] == (taken, there)


def test_biases_that_follow_are_not_counted(tmp_path):
    rng = np.random.default_rng(0)
    base = {
        "layers.0.fc.weight": rng.standard_normal((6, 5)).astype(np.float32),
        "layers.0.fc.bias": np.ones(6, np.float32),
    }
    tuned = {name: array + 1 for name, array in base.items()}
    write_folder(tmp_path / "base", base, 1, LLAMA_CONFIG)
    write_folder(tmp_path / "tuned", tuned, 1, LLAMA_CONFIG)
    patch = ns.extract(
        tmp_path / "base", tmp_path / "tuned", neurons=2, with_bias=True, out=tmp_path / "p.safetensors"
    )
    assert len(patch.tensors) == 2
    assert LayerMap.of_patch(patch).neurons == 2


def test_layers_are_in_natural_order_and_what_is_elsewhere_comes_last():
    found = LayerMap.of_counts(
        {
            "h.10.fc.weight": (1, 4),
            "lm_head.weight": (2, 8),
            "h.9.fc.weight": (3, 4),
            "h.9.experts.0.w.weight": (1, 4),
            "h.9.experts.1.w.weight": (2, 4),
        }
    )
    assert found.layers == ("h.9", "h.10", NO_LAYER)
    assert found.kinds == ("experts.*.w", "fc", "lm_head")
    assert found.chosen.tolist() == [[3, 3, 0], [0, 1, 0], [0, 0, 2]]
    assert found.totals.tolist() == [[8, 4, 0], [0, 4, 0], [0, 0, 8]]
    np.testing.assert_array_equal(np.isnan(found.share), found.totals == 0)
    assert found.row_labels == ("9", "10", "elsewhere")


def test_a_model_without_layers_is_shown_by_its_modules():
    found = LayerMap.of_counts({"rnn_1.kernel": (1, 4), "rnn_2.kernel": (0, 4), "rnn_2.recurrent": (2, 4)})
    assert (found.layers, found.kinds) == (("rnn_1", "rnn_2"), ("kernel", "recurrent"))


def test_folding_keeps_every_neuron():
    counts = {f"layers.{i}.kind{j}.weight": (i * j, 100 + i) for i in range(9) for j in range(7)}
    whole = LayerMap.of_counts(counts)
    folded = whole.folded(4, 3)
    assert folded.chosen.shape == (4, 3)
    assert (folded.neurons, folded.total) == (whole.neurons, whole.total)
    assert folded.kinds == ("kind5", "kind6", "5 others")
    assert whole.folded(9, 7) is not None
    np.testing.assert_array_equal(whole.folded(9, 7).chosen, whole.chosen)


def test_unusual_names_do_not_make_a_huge_map():
    found = LayerMap.of_counts({f"layers.{i}.kind{i}.weight": (1, 2) for i in range(3000)})
    assert found.chosen.shape == (3000, 1)
    assert found.neurons == 3000
