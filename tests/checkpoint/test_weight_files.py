"""Which files of a folder are its weights: those of transformers, diffusers and timm, and any single one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import write_file

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.weight_files import shard_count, weight_files
from neftsurgery.errors import CorruptFileError, UsageError
from neftsurgery.sources.resolve import is_index

TENSORS = {f"layers.{n}.weight": np.arange(6, dtype=np.float32).reshape(3, 2) + n for n in range(4)}
UNET = "diffusion_pytorch_model"


def put(folder: Path, name: str, by: float = 0.0) -> Path:
    """A whole model in one file."""
    folder.mkdir(exist_ok=True, parents=True)
    return write_file(folder / name, {key: array + np.float32(by) for key, array in TENSORS.items()})


def put_shards(folder: Path, index: str, pattern: str, by: float = 0.0) -> Path:
    """The same as two shards, called by ``pattern``."""
    folder.mkdir(exist_ok=True, parents=True)
    weight_map = {}
    for number in (1, 2):
        part = {key: TENSORS[key] + np.float32(by) for key in sorted(TENSORS)[number - 1 :: 2]}
        name = pattern.format(f"{number:05}-of-00002")
        write_file(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / index


def first(named: Path) -> float:
    """The first element of a checkpoint: `put` and `put_shards` make it ``by``."""
    checkpoint = Checkpoint.open(named)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    buffer = bytearray(4)
    checkpoint.read_into("layers.0.weight", 0, memoryview(buffer))
    return float(np.frombuffer(buffer, np.float32)[0])


SINGLE = [
    "model.safetensors",
    f"{UNET}.safetensors",
    f"{UNET}.fp16.safetensors",
    "model.fp16.safetensors",
    "x.safetensors",
]
SHARDED = [
    ("model.safetensors.index.json", "model-{}.safetensors"),
    (f"{UNET}.safetensors.index.json", UNET + "-{}.safetensors"),
    (f"{UNET}.safetensors.index.fp16.json", UNET + ".fp16-{}.safetensors"),
    (f"{UNET}.safetensors.index.fp16.json", UNET + "-{}.fp16.safetensors"),
    ("model.safetensors.index.fp16.json", "model.fp16-{}.safetensors"),
]


@pytest.mark.parametrize("name", SINGLE)
def test_one_file_of_any_name(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, 7)
    assert first(tmp_path) == 7
    assert list(weight_files(tmp_path).parts_of) == [name]


@pytest.mark.parametrize(("index", "pattern"), SHARDED)
def test_shards_with_an_index_by_the_folder_and_by_the_index(
    tmp_path: Path, index: str, pattern: str
) -> None:
    folder, tuned = tmp_path / "base", tmp_path / "tuned"
    put_shards(folder, index, pattern, 7)
    put_shards(tuned, index, pattern, 9)
    assert first(folder) == first(folder / index) == 7
    patch = ns.extract(folder / index, tuned / index, changed=True, reversible=True)
    ns.apply(folder / index, patch, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert first(tmp_path / "out") == 9
    lossless = ns.extract(folder, tuned, lossless=True)
    ns.apply(folder, lossless, out=tmp_path / "again")
    assert first(tmp_path / "again") == 9
    ns.apply(folder, patch, in_place=True)
    ns.revert(folder, patch, in_place=True)
    assert first(folder) == 7


def test_the_plain_file_beats_those_of_variants(tmp_path: Path) -> None:
    put(tmp_path, f"{UNET}.safetensors", 1)
    put(tmp_path, f"{UNET}.fp16.safetensors", 2)
    put_shards(tmp_path, f"{UNET}.safetensors.index.bf16.json", UNET + ".bf16-{}.safetensors", 3)
    assert first(tmp_path) == 1
    assert first(tmp_path / f"{UNET}.fp16.safetensors") == 2


def test_a_variant_is_named_by_its_index(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    put(folder, f"{UNET}.safetensors", 1)
    index = put_shards(folder, f"{UNET}.safetensors.index.bf16.json", UNET + ".bf16-{}.safetensors", 3)
    tuned = put_shards(tmp_path / "t", index.name, UNET + ".bf16-{}.safetensors", 5)
    assert first(index) == 3
    patch = ns.extract(index, tuned, changed=True)
    result = ns.apply(index, patch, out=tmp_path / "out")
    assert first(tmp_path / "out") == 5
    assert [str(path) for path in result.left_behind] == [f"{UNET}.safetensors"]
    with pytest.raises(UsageError, match="what an index names cannot be changed in place") as error:
        ns.apply(index, patch, in_place=True)
    assert "name its folder" in str(error.value.hint)
    assert first(folder) == 1


def test_other_weights_and_their_indexes_are_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    put(folder, "model.safetensors", 1)
    put_shards(folder, "model.safetensors.index.fp16.json", "model.fp16-{}.safetensors", 3)
    tuned = put(tmp_path / "t", "model.safetensors", 2).parent
    result = ns.apply(folder, ns.extract(folder, tuned, changed=True), out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert len(result.left_behind) == 3


def test_several_files_without_an_index_are_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, f"{UNET}.fp16.safetensors")
    put(tmp_path, f"{UNET}.non_ema.safetensors")
    with pytest.raises(UsageError, match="several weight files without an index") as error:
        Checkpoint.open(tmp_path)
    assert (
        error.value.hint
        == f"it does hold {UNET}.fp16.safetensors, {UNET}.non_ema.safetensors: name that file"
    )


def test_several_indexes_are_refused_by_name(tmp_path: Path) -> None:
    indexes = [f"{UNET}.safetensors.index.{variant}.json" for variant in ("bf16", "fp16")]
    for index, variant in zip(indexes, ("bf16", "fp16"), strict=True):
        put_shards(tmp_path, index, UNET + f".{variant}-{{}}.safetensors", len(variant))
    with pytest.raises(UsageError, match="several indexes") as error:
        Checkpoint.open(tmp_path)
    assert error.value.hint == f"name one of them: {', '.join(indexes)}"
    assert first(tmp_path / indexes[0]) == 4


@pytest.mark.parametrize("missing", [1, 2])
def test_shards_without_their_index_are_refused(tmp_path: Path, missing: int) -> None:
    index = put_shards(tmp_path, "model.safetensors.index.json", "model-{}.safetensors")
    index.unlink()
    (tmp_path / f"model-0000{missing}-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="shards without their index"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_of_a_variant_is_named(tmp_path: Path) -> None:
    index = put_shards(tmp_path, f"{UNET}.safetensors.index.fp16.json", UNET + ".fp16-{}.safetensors")
    (tmp_path / f"{UNET}.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="fp16-00002-of-00002") as error:
        Checkpoint.open(tmp_path)
    assert error.value.file == str(index)


@pytest.mark.parametrize(("index", "beside"), [(f"{UNET}.safetensors.index.json", f"{UNET}.safetensors")])
def test_an_index_that_no_reader_takes_is_refused(tmp_path: Path, index: str, beside: str) -> None:
    put(tmp_path, beside)
    put_shards(tmp_path, index, UNET + "-{}.safetensors")
    with pytest.raises(UsageError, match=f"readers take the {beside} beside this index"):
        Checkpoint.open(tmp_path / index)


def test_names_of_indexes_and_shards() -> None:
    for name in ("model.safetensors.index.json", "unet/x.safetensors.index.fp16.json"):
        assert is_index(name)
    for name in ("pytorch_model.bin.index.json", "model.safetensors", "index.json"):
        assert not is_index(name)
    assert shard_count("a-00001-of-00003.safetensors") == shard_count("a-1-of-3.fp16.safetensors") == 3
    assert shard_count("model.safetensors") is None


def test_a_config_of_timm_is_said_not_to_be_known(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "num_classes": 10}')
    (warning,) = ns.inspect(tmp_path)["warnings"]
    assert warning.startswith("config.json names no model_type, and 'vit_tiny_patch16_224' is not known: ")
    with pytest.raises(
        ns.MismatchError, match=r"needs a known architecture, and config\.json names no model_type"
    ):
        ns.inspect(tmp_path, anatomy="units")
