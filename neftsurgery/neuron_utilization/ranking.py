"""The ranks of neurons by correlation, and the rank change above which a neuron is strongly affected."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..selection.budget import Amount

__all__ = ["PAPER_LIMIT", "rank_limit", "ranks"]

PAPER_LIMIT = Fraction(100_000, 32 * 11_008)
"""The paper's limit of 100,000 ranks as a share of the neurons ranked together: the up rows, or the down
columns, of Llama-2-7B (32 layers of 11,008)."""


def ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rank of each value, ``[n]``: 1 for the largest, 0 for NaN. Equal values rank in their order."""
    ranked = np.zeros(len(values), np.int64)
    order = np.argsort(-values, kind="stable")  # NaN last
    order = order[: np.count_nonzero(~np.isnan(values))]
    ranked[order] = np.arange(1, len(order) + 1)
    return ranked


def rank_limit(strongly: Amount | None, pool: int) -> int:
    """The rank change that a strongly affected neuron exceeds, in a pool of ``pool`` neurons."""
    if strongly is None:
        return int(PAPER_LIMIT * pool)
    if strongly.percent is not None:
        return int(strongly.percent / 100 * pool)
    assert strongly.count is not None  # an amount has either a percentage or a count
    return strongly.count
