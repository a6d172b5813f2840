"""Every layout that is known: its numbers against float64, whichever rows and columns are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quantized_support import LAYOUTS, Quantized

from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.dequantized import dequantized


@pytest.fixture(params=LAYOUTS)
def weight(request: pytest.FixtureRequest) -> Quantized:
    return LAYOUTS[request.param](np.random.default_rng(7))


def bytes_of(side: Checkpoint, name: str, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    side.read_into(name, start, memoryview(buffer))
    return bytes(buffer)


def test_codes_and_scales_are_seen_as_the_weight_that_models_have(weight: Quantized, tmp_path: Path) -> None:
    side = dequantized(Checkpoint.open(weight.write(tmp_path / "model")))
    assert list(side.tensors) == [weight.name]
    info = side.tensors[weight.name]
    assert info.shape == weight.numbers.shape
    assert side.parameters == weight.numbers.size
    whole = bytes_of(side, weight.name, 0, info.nbytes)
    found = np.frombuffer(whole, info.type.numpy)
    assert np.array_equal(found, weight.numbers.reshape(-1).astype(info.type.numpy), equal_nan=True)
    if info.dtype == "F32":  # else rounding to it would lose something
        assert np.array_equal(found, weight.numbers.reshape(-1), equal_nan=True)
    for start, stop in ((0, 3), (5, 4099), (info.nbytes // 3, info.nbytes - 1)):
        assert bytes_of(side, weight.name, start, stop) == whole[start:stop]


def test_any_rows_are_read(weight: Quantized, tmp_path: Path) -> None:
    side = dequantized(Checkpoint.open(weight.write(tmp_path / "model")))
    info = side.tensors[weight.name]
    table = weight.numbers.reshape(-1, info.shape[-1]).astype(info.type.numpy)
    for width in (1, 2):  # rows of the tensor, and rows that a caller makes of two
        rows = np.flatnonzero(np.random.default_rng(1).random(len(table) // width) < 0.3)
        out = np.empty((len(rows), width * info.shape[-1] * info.type.itemsize), np.uint8)
        side.read_rows(weight.name, rows, out)
        expected = table[: len(table) // width * width].reshape(-1, width * info.shape[-1])[rows]
        assert np.array_equal(out.view(info.type.numpy), expected, equal_nan=True)
