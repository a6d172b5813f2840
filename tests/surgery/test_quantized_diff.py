"""Quantized checkpoints are scored on the numbers that they stand for, to the accuracy of all others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from quantized_support import LAYER, LAYOUTS, Quantized, e4m3, fp8, fp8_codes, mxfp4, scales_of, spread
from safetensors.numpy import load_file
from test_accuracy import assert_close, reference

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.scoring.engine import stream
from neftsurgery.scoring.partial_sums import CutSizes
from neftsurgery.storage.threads import Limits
from neftsurgery.surgery.diff import plan_diff


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


@pytest.mark.parametrize("layout", ["fp8 blocks", "fp8 rows", "mxfp4"])
def test_codes_and_scales_that_stand_for_nan_are_refused(layout: str, tmp_path: Path) -> None:
    base, tuned = (LAYOUTS[layout](np.random.default_rng(seed)) for seed in (1, 2))
    bad = tuned.scales if layout == "mxfp4" else tuned.codes
    tuned.tensors[bad][1][..., 3, 1] = 0xFF
    sides = base.write(tmp_path / "a"), tuned.write(tmp_path / "b")
    for first, second in (sides, sides[::-1], (base.original(tmp_path / "original", 1e-3)[0], sides[1])):
        for write in (ns.diff, partial(ns.extract, neurons=3)):
            with pytest.raises(
                ns.CorruptFileError, match=f"its scale in {tuned.scales}, stands for NaN"
            ) as caught:
                write(first, second, out=tmp_path / "out")
            assert caught.value.tensor == tuned.codes
            assert caught.value.file == str(sides[1])
            assert sorted(path.name for path in tmp_path.iterdir()) in (["a", "b"], ["a", "b", "original"])


def test_a_nan_of_the_original_is_counted(tmp_path: Path) -> None:
    quantized = fp8(np.random.default_rng(1), "channel")
    numbers = quantized.numbers.copy()
    numbers[7, 3] = np.nan
    original, _ = replace(quantized, numbers=numbers).original(tmp_path / "original", 0)
    assert ns.diff(original, quantized.write(tmp_path / "a")).nonfinite == 1


def test_columns_that_cannot_be_cut_out_are_named_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = LAYOUTS["fp8 rows"](np.random.default_rng(1))
    sides = weight.write(tmp_path / "a"), weight.moved().write(tmp_path / "b")
    ns.diff(*sides)
    assert "across rows of codes" not in caplog.text
    ns.diff(*sides, axis={"*": 1})
    assert f"1 quantized weight lie across rows of codes (first: {weight.name})" in caplog.text


def test_experts_with_a_scale_per_column(tmp_path: Path) -> None:
    sides = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        codes, scales = fp8_codes(rng, (3, 64, 48)), scales_of(rng, (3, 1, 48))
        numbers = e4m3(codes) * scales.astype(np.float64)
        name = f"{LAYER}experts.gate_up_proj"
        tensors = {name: ("F8_E4M3", codes), f"{name}_scale": ("F32", scales.view(np.uint32))}
        section = {"quant_method": "fbgemm_fp8"}
        sides.append(
            Quantized(name, tensors, section, numbers, name, f"{name}_scale", (0, 2), "llama4_text", 64)
        )
    base, tuned = sides
    scores = ns.diff(base.write(tmp_path / "a"), tuned.write(tmp_path / "b"), axis={"*": (0, 2)})
    check(scores, base, base.numbers, tuned.numbers, "cosine")


@pytest.mark.parametrize("layout", ["fp8 blocks", "fp8 rows", "mxfp4"])
def test_pieces_have_the_same_sums_mapped_and_joined_or_not(layout: str, tmp_path: Path) -> None:
    """Of files in which codes begin at an odd byte."""
    sides = []
    for seed in (1, 2):
        weight = LAYOUTS[layout](np.random.default_rng(seed))
        odd = {"a": ("U8", np.arange(3, dtype=np.uint8)), **weight.tensors}
        sides.append(replace(weight, tensors=odd).write(tmp_path / str(seed), shards=1))
    assert Checkpoint.open(sides[0]).position(weight.codes)[1] % 2
    found: list[list[tuple[bytes, ...]]] = []
    for mapped, piece in ((False, 512), (True, 512), (True, 1 << 20)):
        base, tuned, jobs = plan_diff(*sides).pair.compared
        sizes = CutSizes(piece=piece, least_task=1 << 14, least_window=1)
        results = stream(base, tuned, jobs, limits=Limits.of(1, mapped=mapped), sizes=sizes)
        sums = [one.sums for one in results if one.sums is not None]
        found.append([(one.aa.tobytes(), one.dd.tobytes(), one.ad.tobytes()) for one in sums])
    assert len(found[0]) == 1
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("kind", ["cosine", "relative", "changed"])
def test_a_scale_per_row_against_one_of_the_whole_tensor(tmp_path: Path, kind: str) -> None:
    base, tuned = (fp8(np.random.default_rng(n), grid) for n, grid in ((1, "channel"), (2, "tensor")))
    sides = base.write(tmp_path / "a"), tuned.write(tmp_path / "b")
    check(ns.diff(*sides, score=kind), base, base.numbers, tuned.numbers, kind)
    check(ns.diff(*sides[::-1], score=kind), base, tuned.numbers, base.numbers, kind)
