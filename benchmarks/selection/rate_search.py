"""The search for a learning rate: one rule for every arm, on one grid of powers of two."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_exponent(losses: Mapping[int, float], start: int, lowest: int, highest: int) -> int | None:
    """The exponent to try next; None once the best one lies between two that were tried, or at a bound.

    The search goes up from ``start`` while the loss falls, else down while it falls. An equal loss is not an
    improvement, and neither is NaN.
    """
    if start not in losses:
        return start
    best = best_exponent(losses)
    for neighbour in (best + 1, best - 1):
        if lowest <= neighbour <= highest and neighbour not in losses:
            return neighbour
    return None


def best_exponent(losses: Mapping[int, float]) -> int:
    """The exponent with the lowest loss; the lowest exponent among equals."""
    return min(
        losses,
        key=lambda exponent: (losses[exponent] if math.isfinite(losses[exponent]) else math.inf, exponent),
    )
