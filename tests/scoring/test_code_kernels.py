"""Sums of codes with scales against the numbers that they stand for, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neftsurgery.quantization.weight import code_table
from neftsurgery.scoring.code_kernels import code_sums

KINDS = ("F8_E4M3", "F8_E5M2", "E2M1", "offset 4")
#: Factors of the tuned scales. With some, other codes stand for the same numbers.
MOVES = {"equal": 1.0, "near": 1.03, "one ulp": 1 + 2.0**-23, "twice": 2.0, "half": -0.5, "far": 1.7}


def pair(kind: str, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of seven rows on both sides: equal in most places, with zeros in some rows."""
    rng = np.random.default_rng(seed)
    finite = np.flatnonzero((np.isfinite(t := code_table(kind)[0].reshape(256, -1)) & (t != 0)).all(axis=1))
    a, other = rng.choice(finite, (2, 7, width)).astype(np.uint8)
    zeros = [0x88] if kind == "offset 4" else [0, 0x80]
    a[:4] = np.where(rng.random((4, width)) < 0.1, rng.choice(zeros, (4, width)), a[:4])
    b = np.where(rng.random(a.shape) < 0.3, other, a)
    b[2] = a[2]
    return a, b


def summed(kind: str, a: np.ndarray, b: np.ndarray, scales: np.ndarray, groups: int) -> tuple[Any, Any]:
    """The sums of rows that have scales of their own."""
    every = np.arange(len(a))
    return code_sums(kind, (a.reshape(-1), b.reshape(-1)), (scales[0], scales[1]), (every, every), groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("groups", "length"), [(48, 144), (2048, 5120)])  # the last group is shorter
def test_sums_are_those_of_the_numbers(kind: str, move: str, groups: int, length: int) -> None:
    a, b = pair(kind, length, 1)
    shape = 2, 7, -(-length // groups)
    scales = np.random.default_rng(2).uniform(1e-3, 2e-3, shape).astype(np.float32).astype(np.float64)
    scales[1] = (scales[0] * MOVES[move]).astype(np.float32)
    scales[1, :, 0] = scales[0, :, 0]
    sums, changed = summed(kind, a, b, scales, groups)
    table = code_table(kind)[0].astype(np.float64).reshape(256, -1)
    wide = scales.repeat(groups, axis=2)[..., :length, None]
    x, y = ((table[codes] * scale).reshape(7, -1) for codes, scale in zip((a, b), wide, strict=True))
    d = y - x
    assert np.array_equal(changed, (x.view(np.uint64) != y.view(np.uint64)).sum(axis=1))
    aa, dd = (x * x).sum(axis=1), (d * d).sum(axis=1)
    assert np.allclose(sums[0], aa, rtol=1e-6, atol=0)
    assert np.allclose(sums[1], dd, rtol=2e-6, atol=0)
    assert (np.abs(sums[2] - (x * d).sum(axis=1)) <= 1e-6 * np.sqrt(aa * dd)).all()


@pytest.mark.parametrize("kind", ["F8_E4M3", "E2M1"])
@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_scales_that_are_no_numbers_are_not_lost(kind: str, scale: float) -> None:
    a, b = pair(kind, 144, 3)
    scales = np.ones((2, 7, 3))
    scales[1, 4, 1] = scale
    sums, _ = summed(kind, a, b, scales, 48)
    assert np.isfinite(sums[1, [0, 1, 2, 3, 5, 6]]).all()
    assert np.isfinite(sums[1, 4]) == (scale == 0)
