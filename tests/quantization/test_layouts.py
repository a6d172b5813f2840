"""Every layout that is known: its numbers against float64, whichever rows and columns are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parts_support import write_pipeline
from quantized_support import LAYOUTS, Quantized, e4m3, spread
from support import raw_file

import neftsurgery as ns
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


def test_each_part_of_a_pipeline_has_a_layout_of_its_own(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        folder = write_pipeline(tmp_path / str(seed), shards=1)
        for part, layout in (("text_encoder", "fp8 blocks"), ("unet", "int4 groups")):
            weight = LAYOUTS[layout](np.random.default_rng(0))
            (file,) = (folder / part).glob("*.safetensors")
            raw_file(file, (weight.moved() if seed else weight).tensors)
            config = {"model_type": weight.model_type, "quantization_config": dict(weight.section)}
            (folder / part / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    side = dequantized(Checkpoint.open(folders[0]))
    name = "model.layers.0.mlp.up_proj.weight"
    found = {weight.layout: key for key, weight in side.quantized.items()}
    assert found == {"fp8": f"text_encoder/{name}", "packed-int": f"unet/{name}"}
    ns.apply(folders[0], ns.extract(*folders, changed=True), out=tmp_path / "out")
    for file in sorted(folders[1].rglob("*.*")):
        assert (tmp_path / "out" / file.relative_to(folders[1])).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_scales_that_are_powers_of_two(dtype: str, tmp_path: Path) -> None:
    plain = LAYOUTS["fp8 blocks"](np.random.default_rng(0))
    (_, codes), (_, bits) = plain.tensors[plain.codes], plain.tensors[plain.scales]
    powers = np.random.default_rng(1).integers(100, 130, bits.shape).astype(np.uint8)
    weight = replace(plain, tensors={**plain.tensors, plain.scales: (dtype, powers)})
    side = dequantized(Checkpoint.open(weight.write(tmp_path / "model")))
    info = side.tensors[weight.name]
    found = np.frombuffer(bytes_of(side, weight.name, 0, info.nbytes), info.type.numpy)
    expected = e4m3(codes) * spread(2.0 ** (powers.astype(int) - 127), codes.shape, 128, 128)
    assert np.array_equal(found, expected.reshape(-1))
