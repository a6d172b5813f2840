"""The inputs of a report: units, files of other programs, equal names."""

from __future__ import annotations

import numpy as np
from report_support import write_scores
from safetensors import safe_open

import neftsurgery as ns


def test_units_are_counted_as_units(neft, pair, tmp_path):
    ns.diff(*pair, anatomy="units", out=tmp_path / "units.safetensors").close()
    result = neft("report", "units.safetensors", "--json", "--neurons", "10%")
    assert result.code == 0, result.err
    with safe_open(tmp_path / "units.safetensors", "numpy") as file:
        unit, score, base = (file.get_tensor(which) for which in ("unit", "score", "base_sq"))
    of_unit = {int(u): float(score[unit == u][0]) for u in np.unique(unit[unit >= 0])}
    norm = {u: np.sqrt(base[unit == u].sum()) for u in of_unit}
    rows = result.json["figures"]["sensitive"]["rows"]
    first = sorted(of_unit, key=lambda u: -of_unit[u])[: len(rows)]
    np.testing.assert_allclose([row["score"] for row in rows], [of_unit[u] for u in first])
    np.testing.assert_allclose([row["norm"] for row in rows], [norm[u] for u in first])
    assert sum(row["count"] for row in result.json["figures"]["distribution"]["rows"]) == len(of_unit)


def test_scores_of_other_programs_may_lack_the_sums(neft, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.fc.weight" for i in range(3)]
    tensors = {name: {"score": rng.random(50) - 0.5} for name in names}
    tensors[names[0]]["score"][:10] = np.nan
    write_scores(tmp_path / "theirs.safetensors", tensors, dict.fromkeys(names, 4))
    result = neft("report", "theirs.safetensors", "--json", "-o", "page.html")
    assert result.code == 0, result.err
    figures = result.json["figures"]
    assert figures["growth"]["rows"][0]["captured"] is None
    assert {row["control"] for row in figures["correlation"]["rows"]} == {"random"}
    assert sum(row["count"] for row in figures["distribution"]["rows"]) == 140
    assert "lack" in result.json["sections"][0]["verdict"] or "norm" in result.json["sections"][0]["verdict"]


def test_files_with_the_same_name_get_different_names(neft, files):
    (files / "a").mkdir()
    (files / "a" / "scores.safetensors").write_bytes((files / "scores.safetensors").read_bytes())
    result = neft("report", "scores.safetensors", "a/scores.safetensors", "a/scores.safetensors", "--json")
    names = [section["name"] for section in result.json["sections"][:3]]
    assert len(set(names)) == 3
    assert names[1:] == ["a/scores.safetensors", "a/scores.safetensors (2)"]
    assert result.json["figures"]["overlap"]["rows"][0]["jaccard"] == 1.0
