"""The comparison with the controls, compared with numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from report_support import best, kinds_of, read
from scipy.stats import spearmanr

import neftsurgery as ns
from neftsurgery.reporting.control_comparison import spearman


def test_the_overlap_and_correlation_with_the_controls(told, scores, pair, tmp_path):
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


@pytest.mark.parametrize("ties", [1, 7, 1000])
def test_rank_correlation_with_ties(ties):
    rng = np.random.default_rng(ties)
    a = rng.integers(0, ties + 1, 400).astype(np.float64)
    b = a + rng.integers(0, 50, 400)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_a_constant_vector_has_no_correlation():
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert np.isnan(spearman(np.ones(1), np.ones(1)))


def test_the_verdict_names_a_score_that_is_a_control(neft, pair, tmp_path):
    for score, said in (("norm", "is the control norm itself"), ("l2", "sensitive")):
        ns.diff(*pair, score=score, out=tmp_path / f"{score}.safetensors").close()
        verdict = neft("report", f"{score}.safetensors", "--json").json["sections"][0]["verdict"]
        assert said in verdict
