"""Sums of codes with scales against the numbers that they stand for, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from neftsurgery.quantization.codes import code_table
from neftsurgery.scoring.code_kernels import code_sums, tables

KINDS = ("F8_E4M3", "F8_E5M2", "I8", "offset 8", "E2M1", "offset 4")
#: Factors of the tuned scales. With some, other codes stand for the same numbers.
MOVES = {"equal": 1.0, "near": 1.0013, "one ulp": 1 + 2.0**-23, "twice": 2.0, "half": -0.5, "far": 1.7}


def pair(kind: str, seed: int, groups: int = 3, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Codes of seven rows on both sides: equal in most places, and zeros among them."""
    rng = np.random.default_rng(seed)
    finite = np.flatnonzero(np.isfinite(code_table(kind)[0].reshape(256, -1)).all(axis=1))
    a, other = rng.choice(finite, (2, 7, groups * width)).astype(np.uint8)
    a[rng.random(a.shape) < 0.1] = {"offset 8": 128, "offset 4": 0x88}.get(kind, 0)
    b = np.where(rng.random(a.shape) < 0.3, other, a)
    b[2] = a[2]
    return a, b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", MOVES)
def test_sums_are_those_of_the_numbers(kind: str, move: str) -> None:
    a, b = pair(kind, 1)
    scales = np.random.default_rng(2).uniform(1e-3, 2e-3, (2, 7, 3)).astype(np.float32).astype(np.float64)
    scales[1] = (scales[0] * MOVES[move]).astype(np.float32)
    scales[1, :, 0] = scales[0, :, 0]
    numbers, fields = tables(kind)
    sums, changed = np.empty((3, 7)), np.empty(7, np.int64)
    code_sums(kind)(a.reshape(-1), b.reshape(-1), 48, scales, numbers, fields, sums, changed)
    table = numbers.astype(np.float64).reshape(256, -1)
    x, y = (
        table[codes].reshape(7, 3, -1) * scale[..., None] for codes, scale in zip((a, b), scales, strict=True)
    )
    x, y = x.reshape(7, -1), y.reshape(7, -1)
    d = y - x
    assert np.array_equal(changed, (x.view(np.uint64) != y.view(np.uint64)).sum(axis=1))
    aa, dd = (x * x).sum(axis=1), (d * d).sum(axis=1)
    assert np.allclose(sums[0], aa, rtol=1e-6, atol=0)
    assert np.allclose(sums[1], dd, rtol=2e-6, atol=0)
    assert (np.abs(sums[2] - (x * d).sum(axis=1)) <= 1e-6 * np.sqrt(aa * dd)).all()


@pytest.mark.parametrize("kind", ["F8_E4M3", "E2M1"])
@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_scales_that_are_no_numbers_are_not_lost(kind: str, scale: float) -> None:
    a, b = pair(kind, 3)
    scales = np.ones((2, 7, 3))
    scales[1, 4, 1] = scale
    sums, changed = np.empty((3, 7)), np.empty(7, np.int64)
    code_sums(kind)(a.reshape(-1), b.reshape(-1), 48, scales, *tables(kind), sums, changed)
    assert np.isfinite(sums[1, [0, 1, 2, 3, 5, 6]]).all()
    assert np.isfinite(sums[1, 4]) == (scale == 0)


def test_rows_longer_than_a_partial_sum_and_a_group_that_ends_early() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 120, (2, 3, 5000)).astype(np.uint8)
    scales = rng.uniform(1, 2, (2, 3, 2))
    sums, changed = np.empty((3, 3)), np.empty(3, np.int64)
    code_sums("F8_E4M3")(a.reshape(-1), b.reshape(-1), 3000, scales, *tables("F8_E4M3"), sums, changed)
    table = code_table("F8_E4M3")[0].astype(np.float64)
    x, y = (
        table[codes] * np.repeat(scale, 3000, axis=1)[:, :5000]
        for codes, scale in zip((a, b), scales, strict=True)
    )
    assert np.allclose(sums[1], ((y - x) ** 2).sum(axis=1), rtol=1e-6)
    assert np.array_equal(changed, (x != y).sum(axis=1))
