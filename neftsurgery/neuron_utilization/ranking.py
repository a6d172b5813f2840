"""Ranks of neurons by their correlation, and which of them count as strongly affected. Pure arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..selection.budget import Amount

__all__ = ["STRONGLY", "limit_of", "ranks"]

STRONGLY = Fraction(100_000, 32 * 11_008)
"""The paper's 100,000 ranks as a share of what they are ranks of: the up rows, or the down columns, of
Llama-2-7B (32 layers of 11,008)."""


def ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rank of each value, ``[n]``: 1 for the largest; of equal ones the first comes first.

    NaN is not ranked: 0.
    """
    ranked = np.zeros(len(values), np.int64)
    order = np.argsort(-values, kind="stable")  # NaN last
    order = order[: np.count_nonzero(~np.isnan(values))]
    ranked[order] = np.arange(1, len(order) + 1)
    return ranked


def limit_of(strongly: Amount | None, pool: int) -> int:
    """The number of ranks that a strongly affected neuron of a pool of so many moves more than."""
    if strongly is None:
        return int(STRONGLY * pool)
    if strongly.percent is not None:
        return int(strongly.percent / 100 * pool)
    assert strongly.count is not None  # an amount is one of the two
    return strongly.count
