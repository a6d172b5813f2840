"""The inputs of a report: units, files of other programs, equal names."""

from __future__ import annotations

import numpy as np
import pytest
from report_support import write_scores
from safetensors import safe_open

import neftsurgery as ns
from neftsurgery.reporting.inputs import MOST_SHOWN, read_candidates
from neftsurgery.reporting.score_distribution import top_neurons_figure


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


@pytest.mark.parametrize("anatomy", ["rows", "units"])
def test_of_many_candidates_a_sample_and_the_highest_are_read(pair, anatomy):
    scores = ns.diff(*pair, anatomy=anatomy)
    selection = scores.select(neurons="10%")
    every = read_candidates(scores, selection)
    some = read_candidates(scores, selection, most=-(-scores.neurons // 7))
    assert every.step == 1
    assert some.step == 7
    where = {
        place: n for n, place in enumerate(zip(every.tensor.tolist(), every.index.tolist(), strict=True))
    }
    same = [where[place] for place in zip(some.tensor.tolist(), some.index.tolist(), strict=True)]
    assert len(every) / 7 - 1 <= len(some) <= len(every) / 7 + 1 + MOST_SHOWN
    for column in ("score", "base_sq", "delta_sq", "chosen"):
        np.testing.assert_array_equal(getattr(some, column), getattr(every, column)[same])
    assert [every.kinds[n] for n in every.kind[same]] == [some.kinds[n] for n in some.kind]
    np.testing.assert_array_equal(np.array(same)[some.order[:MOST_SHOWN]], every.order[:MOST_SHOWN])
    assert f"one {some.word} in 7" in top_neurons_figure(some, "top").reading
    assert "It shows one" not in top_neurons_figure(every, "top").reading
