"""The table of the neurons with the highest scores, compared with plain numpy."""

from __future__ import annotations

import numpy as np
from report_support import read


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
