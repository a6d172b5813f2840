"""Codes and scales that do not go together, or not with the config, are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_support import LAYER, LAYOUTS, Quantized, compressed, fp8, integers

import neftsurgery as ns

UP = f"{LAYER}up_proj.weight"


def without(weight: Quantized, name: str) -> Quantized:
    return replace(weight, tensors={key: one for key, one in weight.tensors.items() if key != name})


def with_tensor(weight: Quantized, name: str, dtype: str, bits: Any) -> Quantized:
    return replace(weight, tensors={**weight.tensors, name: (dtype, bits)})


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_that_are_missing(layout: str, tmp_path: Path) -> None:
    weight = LAYOUTS[layout](rng())
    broken = without(weight, weight.scales).write(tmp_path / "a")
    with pytest.raises(ns.CorruptFileError, match=r"scales are missing.*_scale") as caught:
        ns.diff(broken, broken, out=tmp_path / "out")
    assert caught.value.tensor == weight.codes
    assert not (tmp_path / "out").exists()


def test_scales_in_a_shard_that_is_lost(tmp_path: Path) -> None:
    weight = fp8(rng(), "block")
    folder = weight.write(tmp_path / "a")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index[weight.scales]).unlink()
    with pytest.raises(ns.CorruptFileError, match="which is not there") as caught:
        ns.diff(folder, folder, out=tmp_path / "out")
    assert caught.value.tensor == weight.scales
    assert not (tmp_path / "out").exists()


def test_scales_that_the_index_lists_and_no_file_has(tmp_path: Path) -> None:
    weight = fp8(rng(), "block")
    folder = without(weight, weight.scales).write(tmp_path / "a", shards=1)
    index = {"weight_map": dict.fromkeys(weight.tensors, "part.safetensors")}
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ns.CorruptFileError, match=r"the index lists .*_scale_inv, and no file has it"):
        ns.diff(folder, folder)


@pytest.mark.parametrize(
    ("layout", "scale", "stored", "expected"),
    [
        ("fp8 blocks", "weight_scale_inv", ("F32", np.ones((3, 3), "u4")), "128 x 128"),
        ("fp8 blocks", "weight_scale_inv", ("I32", np.ones((3, 2), "u4")), "128 x 128"),
        ("fp8 tensor", "weight_scale", ("F32", np.ones(2, "u4")), "300 x 200"),
        ("int4 groups", "weight_scale", ("BF16", np.ones((37, 2), "u2")), "1 x 32"),
        ("int4 groups", "weight_shape", ("I64", np.array([37, 40], "u8")), "4 bits"),
        ("int4 groups", "weight_zero_point", ("I32", np.ones((37, 3), "u4")), r"\[5, 3\]"),
        ("int4 groups", "weight_zero_point", ("I8", np.ones((37, 2), "u1")), r"\[37, 3\]"),
        ("int4 groups", "weight_g_idx", ("I32", np.ones(37, "u4")), r"\[96\]"),
        ("mxfp4", "experts.gate_up_proj_scales", ("U8", np.ones((3, 40, 2), "u1")), r"\[\.\.\., n\]"),
    ],
)
def test_scales_that_do_not_fit(
    layout: str, scale: str, stored: tuple[str, Any], expected: str, tmp_path: Path
) -> None:
    name = f"{LAYER}{scale}" if "experts" in scale else f"{LAYER}up_proj.{scale}"
    folder = with_tensor(LAYOUTS[layout](rng()), name, *stored).write(tmp_path / "a")
    with pytest.raises(ns.MismatchError, match=f"{scale} does not fit the codes.*{expected}") as caught:
        ns.diff(folder, folder, out=tmp_path / "out")
    assert caught.value.tensor is not None
    assert not (tmp_path / "out").exists()


def test_a_column_of_a_group_that_is_not_there(tmp_path: Path) -> None:
    weight = integers(rng(), order=True)
    order = weight.tensors[f"{UP}_g_idx"][1].copy()
    order[5] = 3
    folder = with_tensor(weight, f"{UP}_g_idx", "I32", order).write(tmp_path / "a")
    with pytest.raises(ns.CorruptFileError, match="group") as caught:
        ns.diff(folder, folder)
    assert caught.value.tensor == f"{UP}_g_idx"


def test_a_weight_that_is_there_beside_its_codes(tmp_path: Path) -> None:
    weight = with_tensor(integers(rng()), UP, "BF16", np.ones((37, 96), "u2"))
    with pytest.raises(ns.MismatchError, match="has both"):
        ns.diff(weight.write(tmp_path / "a"), tmp_path / "a")


def test_a_config_that_makes_no_sense(tmp_path: Path) -> None:
    weight = replace(fp8(rng(), "block"), section={"quant_method": "fp8", "weight_block_size": [0, "x"]})
    with pytest.raises(ns.MismatchError, match="weight_block_size"):
        ns.diff(weight.write(tmp_path / "a"), tmp_path / "a")


@pytest.mark.parametrize("model_type", ["llama", "nobody_knows"])
def test_include_never_takes_scales_without_codes(model_type: str, tmp_path: Path) -> None:
    plain = ("BF16", np.arange(12, dtype=np.uint16).reshape(3, 4))
    for number, name in enumerate((f"{UP}_scale_inv", f"{UP}_scale", f"{LAYER}experts.up_proj_scale_inv")):
        tensors = {f"{LAYER}down_proj.weight": plain, name: ("F32", np.ones((3, 2), "u4"))}
        weight = replace(fp8(rng(), "block"), tensors=tensors, model_type=model_type)
        folder = weight.write(tmp_path / str(number))
        scores = ns.diff(folder, folder, include="*")
        assert list(scores.tensors) == [f"{LAYER}down_proj.weight"]


SECTIONS: dict[str, dict[str, Any]] = {
    "no groups": {"config_groups": [1]},
    "groups that are none": {"config_groups": {"a": 5, "b": {"weights": [4]}}},
    "bits that are none": {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4.0}}}},
    "another format": {"format": "nvfp4-pack-quantized"},
    "a format of another type": {"format": ["pack-quantized"]},
    "another method": {"quant_method": "gptq"},
    "a method of another type": {"quant_method": {}},
}


@pytest.mark.parametrize("change", SECTIONS.values(), ids=SECTIONS)
def test_what_no_layout_knows_is_left_out_with_its_scales(change: dict[str, Any], tmp_path: Path) -> None:
    weight = integers(rng())
    plain = ("BF16", np.arange(12, dtype=np.uint16).reshape(3, 4))
    tensors = {**weight.tensors, f"{LAYER}down_proj.weight": plain}
    folder = replace(weight, tensors=tensors, section={**weight.section, **change}).write(tmp_path / "a")
    scores = ns.diff(folder, folder, include="*")
    assert list(scores.tensors) == [f"{LAYER}down_proj.weight"]
    assert set(scores.unscored) == weight.tensors.keys()


@pytest.mark.parametrize("block", [[0, 1], "ab", [-1, 2], [1, 2, 3], None])
def test_blocks_of_a_scheme_that_make_no_sense(block: object, tmp_path: Path) -> None:
    weight = fp8(rng(), "channel")
    section = compressed("float-quantized", type="float", strategy="block", block_structure=block)
    folder = replace(weight, section=section).write(tmp_path / "a")
    with pytest.raises(ns.MismatchError, match="does not fit the codes"):
        ns.diff(folder, folder)


def test_weights_without_elements(tmp_path: Path) -> None:
    empty = ("F8_E4M3", np.zeros((0, 200), np.uint8))
    for grid in ("block", "tensor"):
        weight = fp8(rng(), grid)
        folder = with_tensor(weight, f"{LAYER}gate_proj.weight", *empty).write(tmp_path / grid)
        assert list(ns.diff(folder, folder).tensors) == [UP]


def test_names_under_another_prefix(tmp_path: Path) -> None:
    weight = fp8(rng(), "block")
    other = weight.moved()
    renamed = replace(other, tensors={f"module.{name}": one for name, one in other.tensors.items()})
    base, tuned = weight.write(tmp_path / "a"), renamed.write(tmp_path / "b")
    patch = ns.extract(base, tuned, changed=True, strip_prefix="module")
    assert patch.neurons == len(ns.diff(base, other.write(tmp_path / "c")).select(changed=True))
