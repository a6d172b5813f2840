"""Quantized checkpoints are scored on the numbers that they stand for, to the accuracy of all others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from quantized_support import LAYOUTS, Quantized, e4m3, fp8, mxfp4, spread
from safetensors.numpy import load_file
from test_accuracy import assert_close, reference

import neftsurgery as ns


@pytest.fixture(params=LAYOUTS)
def weights(request: pytest.FixtureRequest) -> tuple[Quantized, Quantized]:
    """Two of one layout: the second has other codes, and other scales, and some rows of the first."""
    base, other = (LAYOUTS[request.param](np.random.default_rng(seed)) for seed in (1, 2))
    return base, other


def vectors(weight: Quantized, numbers: NDArray[Any]) -> NDArray[np.float64]:
    """A neuron a row."""
    front = np.moveaxis(numbers, weight.rows, range(len(weight.rows)))
    count = int(np.prod(front.shape[: len(weight.rows)]))
    return front.reshape(count, -1).astype(np.float64)


def check(scores: ns.Scores, weight: Quantized, a: NDArray[Any], b: NDArray[Any], kind: str) -> None:
    first, second = vectors(weight, a), vectors(weight, b)
    if kind == "changed":  # the sign of a zero is a bit, too
        first, second = first.view(np.uint64), second.view(np.uint64)
    assert_close(scores.values(weight.name), reference(kind, first, second), kind)


@pytest.mark.parametrize("kind", ["cosine", "relative", "changed"])
def test_quantized_against_quantized(weights: tuple[Quantized, Quantized], tmp_path: Path, kind: str) -> None:
    base, tuned = weights
    scores = ns.diff(base.write(tmp_path / "a"), tuned.write(tmp_path / "b"), score=kind)
    assert scores.parameters == base.numbers.size
    check(scores, base, base.numbers, tuned.numbers, kind)


@pytest.mark.parametrize("kind", ["cosine", "relative", "l2"])
def test_quantized_against_its_original(
    weights: tuple[Quantized, Quantized], tmp_path: Path, kind: str
) -> None:
    weight = weights[0]
    original, numbers = weight.original(tmp_path / "original", 1e-2)
    quantized = weight.write(tmp_path / "quantized")
    check(ns.diff(original, quantized, score=kind), weight, numbers, weight.numbers, kind)
    check(ns.diff(quantized, original, score=kind), weight, weight.numbers, numbers, kind)


def test_scales_that_move_a_little_while_codes_do_not(tmp_path: Path) -> None:
    base = fp8(np.random.default_rng(3), "block")
    scales = base.tensors[base.scales][1].view(np.float32)
    moved = scales * (1 + 1e-5 * np.random.default_rng(4).standard_normal(scales.shape)).astype(np.float32)
    moved[1] = scales[1]
    tensors = {**base.tensors, base.scales: ("F32", moved.view(np.uint32))}
    numbers = e4m3(base.tensors[base.codes][1]) * spread(moved, base.numbers.shape, 128, 128)
    tuned = replace(base, tensors=tensors, numbers=numbers)
    for kind in ("cosine", "relative"):
        scores = ns.diff(base.write(tmp_path / f"{kind} a"), tuned.write(tmp_path / f"{kind} b"), score=kind)
        check(scores, base, base.numbers, numbers, kind)


def test_units_of_quantized_experts(tmp_path: Path) -> None:
    pairs = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        up, down = mxfp4(rng, out=64), mxfp4(rng, out=96, width=32)
        renamed = {name.replace("gate_up", "down"): one for name, one in down.tensors.items()}
        pairs.append((replace(up, tensors={**up.tensors, **renamed}), down))
    (base, down_a), (tuned, down_b) = pairs
    scores = ns.diff(base.write(tmp_path / "a"), tuned.write(tmp_path / "b"), anatomy="units", score="l2")
    assert scores.units == 3 * 32
    squares = (tuned.numbers - base.numbers) ** 2
    unit = squares.reshape(3, 96, 32, 2).sum((1, 3)) + ((down_b.numbers - down_a.numbers) ** 2).sum(2)
    scores.save(tmp_path / "scores")
    assert set(np.unique(load_file(tmp_path / "scores")["unit"])) == {*range(96)}
    found = scores.values(base.name).reshape(3, 32, 2)
    assert np.array_equal(found[..., 0], found[..., 1])
    assert_close(found[..., 0].reshape(-1), np.sqrt(unit).reshape(-1), "l2")


def test_nan_codes_are_counted_and_never_chosen(tmp_path: Path) -> None:
    base, tuned = (fp8(np.random.default_rng(seed), "channel") for seed in (1, 2))
    tuned.tensors[tuned.codes][1][7, 3] = 0xFF
    scores = ns.diff(base.write(tmp_path / "a"), tuned.write(tmp_path / "b"))
    assert scores.nonfinite == 1
    assert np.isnan(scores.values(base.name)[7])
