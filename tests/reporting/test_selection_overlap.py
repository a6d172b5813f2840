"""The overlap of several inputs, compared with plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from report_support import best, read
from support import write_folder

import neftsurgery as ns


def test_the_overlap(neft, pair, scores, tmp_path, llama_arrays):
    base, _ = pair
    rng = np.random.default_rng(5)
    other = {
        name: array + (1e-3 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in llama_arrays().items()
    }
    ns.diff(base, write_folder(tmp_path / "other", other), out=tmp_path / "other.safetensors").close()
    ns.extract(*pair, neurons="20%", out=tmp_path / "patch.safetensors").close()
    files = ["scores.safetensors", "other.safetensors", "patch.safetensors"]
    result = neft("report", *files, "--json", "--neurons", "10%")
    assert result.code == 0, result.err
    shares = {"scores.safetensors": 0.1, "other.safetensors": 0.1, "patch.safetensors": 0.2}
    score = {name: read(tmp_path / name)[0] for name in files[:2]} | {"patch.safetensors": read(scores)[0]}
    chosen = {name: best(score[name], round(shares[name] * len(score[name]))) for name in files}
    *_, tensor, _, _, _ = read(scores)
    layer = np.array([".".join(name.split(".")[:3]) for name in tensor])
    rows = result.json["figures"]["overlap"]["rows"]
    assert len(rows) == 3
    by_layer = result.json["figures"]["overlap-by-layer"]["rows"]
    assert len(by_layer) == 6
    for row in [*rows, *by_layer]:
        where = layer == row["layer"] if "layer" in row else np.ones(len(tensor), bool)
        a, b = chosen[row["first"]] & where, chosen[row["second"]] & where
        smaller = min(a.sum(), b.sum())
        assert (row["first_neurons"], row["second_neurons"]) == (a.sum(), b.sum())
        assert row["shared"] == (a & b).sum()
        assert row["jaccard"] == pytest.approx((a & b).sum() / (a | b).sum())
        assert row["shared_share"] == pytest.approx((a & b).sum() / smaller)
        chance = sum(a[tensor == t].sum() * b[tensor == t].mean() for t in set(tensor))
        assert row["chance_share"] == pytest.approx(chance / smaller)
