"""The captured change by budget, compared with plain numpy."""

from __future__ import annotations

import pytest
from report_support import best, kinds_of, read

PERCENTS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20)


def test_the_captured_change(told, scores):
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
