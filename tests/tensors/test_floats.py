"""Numbers from raw bits and back, against torch and against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from neftsurgery.tensors.dtypes import DTYPES
from neftsurgery.tensors.floats import FLOATS, narrow, widen

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
SHORT = sorted(FLOATS - {"F32", "F64"})


def codes(dtype: str) -> np.ndarray:
    """Every pattern of a short type, as raw bytes."""
    return np.arange(1 << DTYPES[dtype].bits).astype(DTYPES[dtype].carrier).view(np.uint8)


def by_torch(raw: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(raw.copy()).view(TORCH[dtype]).to(torch.float64).numpy()


def test_every_float_that_is_scored_is_known():
    from neftsurgery.scoring.kernels import FORMATS

    assert set(FORMATS) == FLOATS == set(TORCH)


@pytest.mark.parametrize("dtype", SHORT)
def test_every_pattern_widens_as_in_torch_and_comes_back(dtype):
    values = widen(codes(dtype), dtype)
    np.testing.assert_array_equal(values, by_torch(codes(dtype), dtype))
    back = narrow(values, dtype)
    finite = ~np.isnan(values)
    carrier = DTYPES[dtype].carrier
    np.testing.assert_array_equal(back.view(carrier)[finite], codes(dtype).view(carrier)[finite])
    assert np.isnan(widen(back, dtype)[~finite]).all()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_long_types_keep_their_bits(dtype):
    raw = np.random.default_rng(0).integers(0, 256, (50, 64), np.uint8)
    values = widen(raw, dtype)
    assert values.shape == (50, 64 // DTYPES[dtype].itemsize)
    finite = np.isfinite(values)
    carrier = DTYPES[dtype].carrier
    np.testing.assert_array_equal(narrow(values, dtype).view(carrier)[finite], raw.view(carrier)[finite])


@pytest.mark.parametrize("dtype", SHORT)
def test_narrowing_takes_the_nearest_and_the_even_one_of_two(dtype):
    """Beside every midpoint of neighbours, by exact fractions; a float32 in between would lose `just`."""
    values = widen(codes(dtype), dtype)
    grid = np.unique(np.abs(values[np.isfinite(values)]))
    step = 1 if len(grid) < 1000 else 37
    low, high = grid[:-1:step], grid[1::step]
    middle = (low + high) / 2
    for sign in (1, -1):
        for value, expected in ((np.nextafter(middle, 0), low), (np.nextafter(middle, np.inf), high)):
            found = widen(narrow(sign * value, dtype), dtype)
            np.testing.assert_array_equal(np.abs(found), expected)
        found = np.abs(widen(narrow(sign * middle, dtype), dtype))
        even = narrow(low, dtype).view(DTYPES[dtype].carrier) % 2 == 0
        np.testing.assert_array_equal(found, np.where(even, low, high))
    assert 2 * Fraction(middle[-1]) == Fraction(low[-1]) + Fraction(high[-1])  # float64 has room for it


@pytest.mark.parametrize("dtype", SHORT)
def test_narrowing_float32_is_torch_s(dtype):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 20000, np.uint32).view(np.float32)
    values = np.concatenate([values, rng.standard_normal(20000).astype(np.float32), np.float32([0.0, -0.0])])
    every = widen(codes(dtype), dtype)
    values = values[np.abs(values) <= every[np.isfinite(every)].max()]  # beyond, torch has its own ways
    expected = torch.from_numpy(values).to(TORCH[dtype]).to(torch.float64).numpy()
    found = widen(narrow(values, dtype), dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_what_is_too_large(dtype):
    found = widen(narrow(np.array([np.inf, -np.inf, np.nan, 1e300, -1e300]), dtype), dtype)
    assert np.isnan(found[2])
    if dtype in ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        largest = {"F8_E4M3": 448, "F8_E4M3FNUZ": 240, "F8_E5M2FNUZ": 57344}[dtype]
        assert np.isnan(found[:2]).all()
        np.testing.assert_array_equal(found[3:], [largest, -largest])
    else:
        np.testing.assert_array_equal(found[:2], [np.inf, -np.inf])
        largest = 1e300 if dtype == "F64" else np.inf
        np.testing.assert_array_equal(found[3:], [largest, -largest])
