"""The histograms of the scores, compared with plain numpy."""

from __future__ import annotations

from report_support import best, kinds_of, read


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
