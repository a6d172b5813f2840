"""Ranks, and the limit above which a neuron is strongly affected."""

from __future__ import annotations

import numpy as np

from neftsurgery.neuron_utilization.result import rank_limit, ranks
from neftsurgery.selection.budget import Amount

NAN = float("nan")


def test_ranks() -> None:
    assert ranks(np.array([0.2, 0.9, 0.2, NAN, 0.5])).tolist() == [3, 1, 4, 0, 2]
    assert ranks(np.zeros(0)).tolist() == []


def test_the_papers_limit_is_100_000_ranks_of_its_model() -> None:
    assert rank_limit(None, 32 * 11_008) == 100_000
    assert rank_limit(None, 0) == 0
    assert rank_limit(Amount.parse("10%"), 209) == 20
    assert rank_limit(Amount.parse(50), 7) == 50
