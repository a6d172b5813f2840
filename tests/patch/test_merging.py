"""Merging blocks of rows: the arithmetic alone. PEFT's TIES is one oracle, numpy the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neftsurgery.patch.merging import Part, magnitudes, merge_rows
from neftsurgery.selection.choice import CutSearch
from neftsurgery.tensors.floats import narrow, widen


def raw(values: object) -> np.ndarray:
    return narrow(np.asarray(values, np.float64), "F32")


def read(rows: np.ndarray) -> np.ndarray:
    return widen(rows, "F32")


def part(slots: list[int], values: object, weight: float = 1, least: float = 0) -> Part:
    return Part(np.array(slots), raw(values), weight, least)


def test_who_wins() -> None:
    parts = [part([0, 1], [[1, 1], [2, 2]]), part([1, 2], [[3, 3], [4, 4]])]
    np.testing.assert_array_equal(read(merge_rows("first", "F32", parts, None, 3)), [[1, 1], [2, 2], [4, 4]])
    np.testing.assert_array_equal(read(merge_rows("last", "F32", parts, None, 3)), [[1, 1], [3, 3], [4, 4]])


def test_mean_and_sum() -> None:
    base = raw([[1, 1], [1, 1], [1, 1]])
    parts = [part([0, 1], [[2, 2], [2, 3]], 3), part([1, 2], [[5, 5], [7, 9]], 1)]
    mean = read(merge_rows("mean", "F32", parts, None, 3))
    np.testing.assert_array_equal(mean, [[2, 2], [2.75, 3.5], [7, 9]])
    total = read(merge_rows("sum", "F32", parts, base, 3))
    np.testing.assert_array_equal(total, [[4, 4], [8, 11], [7, 9]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 5])
def test_ties_is_peft_s(density: float, count: int) -> None:
    from peft.utils.merge_utils import ties

    rng = np.random.default_rng(count)
    base = read(raw(rng.standard_normal((20, 30))))
    tuned = [read(raw(base + 0.1 * rng.standard_normal(base.shape))) for _ in range(count)]
    magnitudes = [threshold(raw(t), raw(base), density) for t in tuned]
    parts = [part(list(range(20)), t, 1, least) for t, least in zip(tuned, magnitudes, strict=True)]
    found = read(merge_rows("ties", "F32", parts, raw(base), 20)) - base
    tasks = [torch.from_numpy(t - base) for t in tuned]
    expected = ties(tasks, torch.ones(count, dtype=torch.float64), density, "total").numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def threshold(values: np.ndarray, base: np.ndarray, density: float, **options: int) -> float:
    found = CutSearch()
    for again in (False, True):
        for some in magnitudes(values, base, "F32", **options):
            found.add(some)
        found.settle(found.room if again else max(1, round(density * found.total)) - 1)
    return float(found.cut)


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.999, 1.0])
def test_the_threshold_is_that_of_sorting(density: float) -> None:
    rng = np.random.default_rng(0)
    steps = 10.0 ** rng.integers(-40, 30, (40, 7)) * rng.standard_normal((40, 7))
    steps[3] = 0
    steps[5] = steps[6]
    found = threshold(raw(steps), raw(np.zeros_like(steps)), density, batch_bytes=200)
    ordered = np.sort(np.abs(read(raw(steps))).ravel())[::-1]
    assert found == ordered[max(1, round(density * ordered.size)) - 1]


def test_ties_of_what_cancels_is_the_base() -> None:
    base = raw([[1.0, 1.0]])
    parts = [part([0], [[2.0, 2.0]]), part([0], [[0.0, 3.0]])]
    np.testing.assert_array_equal(read(merge_rows("ties", "F32", parts, base, 1)), [[1.0, 2.5]])


def test_what_is_not_finite_stays_so() -> None:
    base = raw([[1.0, 1.0, 1.0]])
    parts = [part([0], [[np.nan, np.inf, 2.0]]), part([0], [[1.0, np.inf, 2.0]])]
    mean = read(merge_rows("mean", "F32", parts, None, 1))
    np.testing.assert_array_equal(mean, [[np.nan, np.inf, 2.0]])
    for policy in ("sum", "ties"):
        found = read(merge_rows(policy, "F32", parts, base, 1))[0]
        assert np.isnan(found[0])
        assert found[1] == np.inf
