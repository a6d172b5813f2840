"""The search for a learning rate: one rule for every arm, on one ladder of rates."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_rung(losses: Mapping[int, float], start: int, lowest: int, highest: int) -> int | None:
    """Which rung to try next; None once the best one found lies between two that were tried, or at a bound.

    Up from ``start`` as long as that helps; else down as long as that does. Equal losses do not help, nor
    does one that is no number.
    """
    if start not in losses:
        return start
    best = best_rung(losses)
    for neighbour in (best + 1, best - 1):
        if lowest <= neighbour <= highest and neighbour not in losses:
            return neighbour
    return None


def best_rung(losses: Mapping[int, float]) -> int:
    """The rung of the least loss; of equal ones the lowest."""
    return min(losses, key=lambda rung: (losses[rung] if math.isfinite(losses[rung]) else math.inf, rung))
