"""The report's numbers, beside computations in plain numpy from what the files say."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from report_support import write_scores
from safetensors import safe_open
from scipy.stats import spearmanr
from support import write_folder

import neftsurgery as ns
from neftsurgery.reporting.control_comparison import spearman
from neftsurgery.reporting.figure import Table

PERCENTS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20)


def read(path):
    """All neurons of a scores file, one after the other: score, |a|^2, |d|^2, tensor name, index, kind."""
    with safe_open(path, "numpy") as file:
        told = json.loads(file.metadata()["neuron_scores"])
        names = sorted(told["tensors"])
        score = np.concatenate([file.get_tensor(name) for name in names]).astype(np.float64)
        base, delta = (
            np.concatenate([file.get_tensor(f"{name}:{which}") for name in names])
            for which in ("base_sq", "delta_sq")
        )
        counts = [len(file.get_tensor(name)) for name in names]
        widths = [told["tensors"][name]["shape"][1] for name in names]
    rest = sum(entry["delta_sq"] or 0 for entry in told.get("unscored", {}).values())
    tensor = np.repeat(names, counts)
    index = np.concatenate([np.arange(count) for count in counts])
    return score, base, delta, tensor, index, rest, np.repeat(widths, counts)


@pytest.fixture
def scores(pair, tmp_path):
    ns.diff(*pair, out=tmp_path / "scores.safetensors").close()
    return tmp_path / "scores.safetensors"


@pytest.fixture
def told(neft, scores):
    result = neft("report", scores, "--json", "--neurons", "5%")
    assert result.code == 0, result.err
    return result.json


def best(score, count):
    """A mask of the first ``count`` in order."""
    mask = np.zeros(len(score), bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


def kinds_of(tensor):
    return np.array([name.split(".", 3)[3].removesuffix(".weight") for name in tensor])


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


def test_the_distribution(told, scores):
    score, *_, tensor, _, _, _ = read(scores)
    chosen, kinds = best(score, round(0.05 * len(score))), kinds_of(tensor)
    rows = told["figures"]["distribution"]["rows"]
    top = score.max()
    for row in rows:
        low, high = row["from"], row["to"]
        inside = (kinds == row["kind"]) & (score >= low) & ((score < high) | ((high == top) & (score == top)))
        assert (row["count"], row["chosen"]) == (inside.sum(), chosen[inside].sum())
    assert sum(row["count"] for row in rows) == len(score)
    assert sum(row["chosen"] for row in rows) == chosen.sum()


def test_the_growth(told, scores):
    score, _, delta, tensor, _, rest, width = read(scores)
    kinds = kinds_of(tensor)
    rows = told["figures"]["growth"]["rows"]
    assert [row["budget"] for row in rows] == [f"{percent:g}%" for percent in PERCENTS]
    for row, percent in zip(rows, PERCENTS, strict=True):
        chosen = best(score, max(1, int(percent * len(score) / 100 + 0.5)))
        assert row["neurons"] == chosen.sum()
        assert row["parameters"] == width[chosen].sum()
        assert row["captured"] == pytest.approx(delta[chosen].sum() / (delta.sum() + rest))
        assert row["captured_scored"] == pytest.approx(delta[chosen].sum() / delta.sum())
        for kind in told["figures"]["growth-by-kind"]["rows"]:
            if kind["budget"] == row["budget"]:
                mine = kinds == kind["kind"]
                assert (kind["chosen"], kind["total"]) == (chosen[mine].sum(), mine.sum())


def test_the_most_sensitive(told, scores):
    score, base, delta, tensor, index, _, _ = read(scores)
    order = np.argsort(-score, kind="stable")[:20]
    rows = told["figures"]["sensitive"]["rows"]
    assert [(row["tensor"], row["index"]) for row in rows] == [(tensor[i], index[i]) for i in order]
    np.testing.assert_allclose([row["score"] for row in rows], score[order])
    np.testing.assert_allclose([row["norm"] for row in rows], np.sqrt(base[order]))
    np.testing.assert_allclose([row["relative_change"] for row in rows], np.sqrt(delta[order] / base[order]))
    np.testing.assert_allclose([row["smaller"] for row in rows], [(base < base[i]).mean() for i in order])
    assert [row["rank"] for row in rows] == list(range(1, 21))


def test_the_agreement_with_the_controls(told, scores, pair, tmp_path):
    score, _, _, tensor, _, _, _ = read(scores)
    kinds = kinds_of(tensor)
    controls = {}
    for name in ("norm", "random"):  # as `diff --score` gives them
        ns.diff(*pair, score=name, out=tmp_path / f"{name}.safetensors").close()
        controls[name] = read(tmp_path / f"{name}.safetensors")[0]
    for row in told["figures"]["agreement"]["rows"]:
        count = max(1, int(float(row["budget"].rstrip("%")) * len(score) / 100 + 0.5))
        mine, other = best(score, count), best(controls[row["control"]], count)
        assert (row["chosen"], row["shared"]) == (count, (mine & other).sum())
        assert row["jaccard"] == pytest.approx((mine & other).sum() / (mine | other).sum())
        assert row["chance"] == pytest.approx(count / len(score))
    rows = told["figures"]["correlation"]["rows"]
    assert len(rows) == 2 * 8
    for row in rows:
        mine = kinds == row["kind"] if row["kind"] != "all" else np.ones(len(score), bool)
        expected = spearmanr(score[mine], controls[row["control"]][mine]).statistic
        assert row["count"] == mine.sum()
        assert row["correlation"] == pytest.approx(expected, abs=1e-9)


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


def test_units_are_counted_as_units(neft, pair, tmp_path):
    ns.diff(*pair, anatomy="units", out=tmp_path / "units.safetensors").close()
    result = neft("report", "units.safetensors", "--json", "--neurons", "10%")
    assert result.code == 0, result.err
    with safe_open(tmp_path / "units.safetensors", "numpy") as file:
        names = sorted(name for name in file.keys() if ":" not in name)  # noqa: SIM118
        unit = np.concatenate([file.get_tensor(f"{name}:unit") for name in names])
        score = np.concatenate([file.get_tensor(name) for name in names])
        base = np.concatenate([file.get_tensor(f"{name}:base_sq") for name in names])
    of_unit = {int(u): float(score[unit == u][0]) for u in np.unique(unit[unit >= 0])}
    norm = {u: np.sqrt(base[unit == u].sum()) for u in of_unit}
    rows = result.json["figures"]["sensitive"]["rows"]
    first = sorted(of_unit, key=lambda u: -of_unit[u])[: len(rows)]
    np.testing.assert_allclose([row["score"] for row in rows], [of_unit[u] for u in first])
    np.testing.assert_allclose([row["norm"] for row in rows], [norm[u] for u in first])
    assert sum(row["count"] for row in result.json["figures"]["distribution"]["rows"]) == len(of_unit)


def test_scores_of_other_makers_may_lack_the_sums(neft, tmp_path):
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


@pytest.mark.parametrize("ties", [1, 7, 1000])
def test_rank_correlation_with_ties(ties):
    rng = np.random.default_rng(ties)
    a = rng.integers(0, ties + 1, 400).astype(np.float64)
    b = a + rng.integers(0, 50, 400)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_what_has_no_ranks_has_no_correlation():
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert np.isnan(spearman(np.ones(1), np.ones(1)))


def test_figures_and_json_hold_the_same_numbers(scores):
    """Of every figure the CSV, the table on the page and the JSON come from one table."""
    made = ns.report(scores)
    told = made.describe()
    for name, figure in made.figures.items():
        assert isinstance(figure.table, Table)
        rows = list(csv.DictReader(io.StringIO(figure.table.csv())))
        assert len(rows) == len(told["figures"][name]["rows"])
        for row, expected in zip(rows, told["figures"][name]["rows"], strict=True):
            for key, value in expected.items():
                assert row[key] == ("" if value is None else str(value)), (name, key)
