"""Files and folders of other kinds: each is called what it is, and the commands shown work."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save
from support import write_file, write_folder

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.tensors.file_kinds import foreign_file
from neftsurgery.tensors.header import read_header

ARRAYS = {
    "model.layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.norm.weight": np.ones(4, np.float32),
}
HTML = "<!DOCTYPE html>\n<html><head><title>401</title></head></html>"


def torch_saved(path: Path, **how: bool) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(tensors | {"tied": tensors["model.norm.weight"]}, path, **how)  # two names of one storage


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def torchscript(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated; its files are there
        torch.jit.save(torch.jit.trace(Scaled(), torch.ones(1, 3)), path)


def zipped(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x" * 10_000)


def tarred(path: Path, mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        entry = tarfile.TarInfo("./model_config.yaml")
        archive.addfile(entry, io.BytesIO(b""))


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **ARRAYS)


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ARRAYS["model.norm.weight"])


def contains(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, as protocol buffers encode it."""
    return bytes([number << 3 | 2, len(content)]) + content


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 123, 0) + bytes(100)  # 123 tensors: the ninth byte is "{"
ONNX = bytes([8, 8]) + field(2, b"pytorch") + field(3, b"2.13.0") + field(7, bytes(50))
FLAX = b"\x81\xa5model\x82\xa4norm\xc0\xa5layer\xc0"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n".encode()
INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"w": "pytorch_model-1.bin"}}).encode()

#: The file; how it is made; what the message calls it; what helps.
FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "torch.save": (torch_saved, "PyTorch pickle", "weights_only=True"),
    "old torch.save": (
        lambda path: torch_saved(path, _use_new_zipfile_serialization=False), "PyTorch pickle", "torch.load"
    ),
    "TorchScript": (torchscript, "TorchScript", "jit.load"),
    "pickle": (contains(pickle.dumps({"w": 1})), "Python pickle", "runs its code"),
    "npz": (npz, "NumPy archive", "numpy.load"),
    "npy": (npy, "one NumPy array", "save_file"),
    "GGUF": (contains(GGUF), "GGUF", "gguf_file="),
    "GGML": (contains(b"lmgg" + bytes(100)), "GGML", "safetensors weights"),
    "HDF5": (contains(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5", "from_tf"),
    "Keras 3": (lambda path: zipped(path, "model.weights.h5"), "HDF5", "from_tf"),
    "Flax": (contains(FLAX), "Flax", "from_flax"),
    "ONNX": (contains(ONNX), "ONNX", "safetensors weights"),
    "TFLite": (contains(b"\x1c\0\0\0TFL3" + bytes(50)), "TensorFlow Lite", "safetensors weights"),
    "zip": (lambda path: zipped(path, "notes.txt"), "zip archive", "unzip"),
    "tar": (lambda path: tarred(path, "w"), "tar archive", "tar -xf"),
    "tar.gz": (lambda path: tarred(path, "w:gz"), "gzip archive", "tar -xf"),
    "gzip": (contains(gzip.compress(b"x" * 99)), "gzip archive", "gzip -d"),
    "xz": (contains(lzma.compress(b"x" * 99)), "compressed archive", "tar -xf"),
    "bz2": (contains(bz2.compress(b"x" * 99)), "compressed archive", "tar -xf"),
    "zstd": (contains(b"\x28\xb5\x2f\xfd\x04\x58" + bytes(30)), "zstd archive", "zstd -d"),
    "LFS": (contains(LFS), "Git LFS pointer", "git lfs pull"),
    "annex": (contains(b"/annex/objects/SHA256E-s99--0.safetensors\n"), "git-annex pointer", "git annex get"),
    "HTML": (contains(HTML.encode()), "web page", "hf download"),
    "S3 error": (contains(b'<?xml version="1.0"?><Error>Gone</Error>'), "web page", "hf download"),
    "plain error": (contains(b"Entry not found"), "'Entry not found'", "hf download"),
    "JSON error": (contains(b'{"error":"Invalid credentials"}'), "Invalid credentials", "hf download"),
    "index": (contains(INDEX), "index of shards", "name its folder"),
    "config": (contains(b'{\n "architectures": ["LlamaForCausalLM"]}'), "config of a model", "its folder"),
    "adapter config": (contains(b'{"peft_type": "LORA"}'), "config of a PEFT adapter", "name its folder"),
    "empty": (contains(b""), "an empty file", "hf download"),
    "zeros": (contains(bytes(5000)), "zeros", "hf download"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    make, what, helps = FILES[name]
    base = write_folder(tmp_path / "base", ARRAYS)
    path = tmp_path / "it's a file.safetensors"  # the name says nothing
    make(path)
    for verb in (
        lambda: ns.diff(base, path),
        lambda: ns.diff(path, base),
        lambda: ns.apply(base, path, out=tmp_path / "out"),
        lambda: ns.inspect(path),
    ):
        with pytest.raises(ns.CorruptFileError) as error:
            verb()
        message = str(error.value)
        assert str(path) in message
        assert what in str(error.value.found)
        assert helps in str(error.value.hint)
        assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["torch.save", "old torch.save", "TorchScript", "npz"])
def test_the_command_that_the_message_shows_converts_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "it's a file.bin"
    FILES[name][0](path)
    with pytest.raises(ns.CorruptFileError) as error:
        read_header(path)
    command = str(error.value.hint).partition("convert it: `python ")[2].removesuffix("`")
    command = f"{shlex.quote(sys.executable)} {command}"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=300)
    found = load_file(tmp_path / "OUT.safetensors")
    expected = {"weight": ARRAYS["model.layers.0.weight"]} if name == "TorchScript" else ARRAYS
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    assert Checkpoint.open(tmp_path / "OUT.safetensors").tensors.keys() == found.keys()


def test_the_command_for_gguf_asks_of_transformers_what_it_has(tmp_path: Path) -> None:
    """It was run once, with the package gguf, which is not among those that the tests install."""
    from transformers import GgufConfig

    (tmp_path / "m.gguf").write_bytes(GGUF)
    with pytest.raises(ns.CorruptFileError) as error:
        read_header(tmp_path / "m.gguf")
    words = shlex.split(str(error.value.hint).partition("`")[2].removesuffix("`"))
    assert words[3:] == [str(tmp_path), "m.gguf", "OUT"]
    compile(words[2], "command", "exec")
    assert "GgufConfig as G" in words[2]
    assert GgufConfig(dequantize=True).dequantize


def test_a_damaged_safetensors_file_is_called_nothing_else(tmp_path: Path) -> None:
    """Its header's length may begin like a pickle, a gzip archive or msgpack."""
    path = tmp_path / "m.safetensors"
    for first in (b"\x80\x02", b"\x1f\x8b", b"\x81\xa5", b"\x08\x07\x12", b"\0\0"):
        path.write_bytes(first.ljust(8, b"\0") + b'{"w":{"dtype":"F32"' + b"." * 99)
        assert foreign_file(path) is None
    whole = save(ARRAYS)
    rng = random.Random(0)
    for cut in (8, 9, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert foreign_file(path) is None or cut == 8
    for _ in range(200):
        at = rng.randrange(9, len(whole))
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        assert foreign_file(path) is None


#: A folder by the files it holds; what the message calls it; what helps.
FOLDERS: dict[str, tuple[list[str], str, str]] = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter", "diff BASE"),
    "DCP": ([".metadata", "__0_0.distcp"], "DCP", "accelerate merge-weights"),
    "FSDP": (["pytorch_model_fsdp_0/", "optimizer_0/"], "FSDP", "pytorch_model_fsdp_0 OUT"),
    "ZeRO": (["global_step9/", "zero_to_fp32.py", "config.json"], "DeepSpeed", "zero_to_fp32"),
    "ZeRO ranks": (["mp_rank_00_model_states.pt"], "one part a rank", "zero_to_fp32"),
    "FSDP ranks": (["model_world_size_2_rank_0.pt", "config.json"], "one a rank", "join"),
    "Megatron": (["latest_checkpointed_iteration.txt", "iter_0000100/"], "Megatron", "Megatron Bridge"),
    "pipeline": (["model_index.json", "unet/"], "pipeline", "weight file"),
    "patch": (["neuron_patch.safetensors", "README.md"], "a neuron patch", "as PATCH, after the base"),
    "trainer": (["checkpoint-500/", "trainer_state.json"], "training checkpoints", "checkpoint-500"),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json"], "None", "hf download"),
    "empty": ([], "an empty folder", "weights"),
}


def folder_of(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for name in names:
        (path / name).mkdir() if name.endswith("/") else (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    names, what, helps = FOLDERS[name]
    folder = folder_of(tmp_path / "a folder", names)
    base = write_folder(tmp_path / "base", ARRAYS)
    for verb in (lambda: ns.diff(folder, base), lambda: ns.inspect(folder)):
        with pytest.raises(ns.UsageError, match="holds neither") as error:
            verb()
        assert what in str(error.value.found)
        assert helps in str(error.value.hint)
        if str(folder) in str(error.value.hint):
            assert f"'{folder}'" in str(error.value.hint)  # quoted for a shell


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_a_folder_of_other_weights_shows_how_to_convert_them(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "m", ["config.json", "tokenizer.json"])
    torch_saved(folder / name)
    with pytest.raises(ns.UsageError) as error:
        Checkpoint.open(folder)
    assert str(error.value.found) == f"{name}, a PyTorch pickle, as torch.save writes"
    assert str(folder / name) in str(error.value.hint)


def test_the_command_for_shards_converts_all_of_them_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a model", ["config.json", "pytorch_model.bin.index.json"])
    for number, (name, array) in enumerate(ARRAYS.items(), 1):
        torch.save({name: torch.from_numpy(array)}, folder / f"pytorch_model-{number:05}-of-00002.bin")
    for name in ("optimizer.bin", "training_args.bin"):
        torch.save({"state": torch.ones(2)}, folder / name)
    with pytest.raises(ns.UsageError) as error:
        Checkpoint.open(folder)
    assert str(error.value.found).startswith("pytorch_model-00001-of-00002.bin, a PyTorch pickle")
    command = str(error.value.hint).partition("convert it: `python ")[2].removesuffix("`")
    command = f"{shlex.quote(sys.executable)} {command}"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=300)
    found = load_file(tmp_path / "OUT.safetensors")
    assert found.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(found[key], array)


def test_a_distributed_checkpoint_joins_by_the_command_shown(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is only this process
        dcp.save({"model": tensors}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(ns.UsageError, match="DCP") as error:
        Checkpoint.open(tmp_path / "dcp")
    command = str(error.value.hint).partition("`accelerate merge-weights ")[2].removesuffix("`")
    joined = f"{shlex.quote(str(Path(sys.executable).parent / 'accelerate'))} merge-weights {command}"
    subprocess.run(joined, shell=True, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    found = Checkpoint.open(tmp_path / "OUT")
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: array.shape for name, array in ARRAYS.items()
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    base = {f"model.layers.{n}.weight": rng.standard_normal((6, 4), np.float32) for n in range(2)}
    write_folder(tmp_path / "base", base, shards=2)
    write_folder(tmp_path / "tuned", {name: array + 1 for name, array in base.items()})
    scores = ns.diff(tmp_path / "base", tmp_path / "tuned", out=tmp_path / "scores.safetensors")
    scores.select(neurons=3).save(tmp_path / "selection.safetensors")
    ns.extract(tmp_path / "base", tmp_path / "tuned", neurons=3, out=tmp_path / "neuron_patch.safetensors")
    folder_of(tmp_path / "adapter", ["adapter_config.json"])
    write_file(
        tmp_path / "adapter" / "adapter_model.safetensors",
        {"base_model.model.model.layers.0.lora_A.weight": np.ones((1, 4), np.float32)},
    )
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found", "helps"),
    [
        ("scores.safetensors", "a scores file", "extract BASE TUNED --scores scores.safetensors"),
        ("selection.safetensors", "a selection", "extract BASE TUNED --selection selection.safetensors"),
        ("adapter/adapter_model.safetensors", "a PEFT adapter", "extract BASE ADAPTER --changed"),
        ("tuned/model.safetensors", "a checkpoint", "the base comes first"),
        ("tuned", None, "the base comes first"),
        ("adapter", None, "extract BASE ADAPTER --changed"),
        (".", None, "name the file in it: ./neuron_patch.safetensors"),
    ],
)
def test_another_kind_where_a_patch_is_wanted(
    files: Path, monkeypatch: pytest.MonkeyPatch, given: str, found: str | None, helps: str
) -> None:
    monkeypatch.chdir(files)
    for verb in (lambda: ns.apply("base", given, out="new"), lambda: ns.verify("base", given)):
        with pytest.raises(ns.NeftError) as error:
            verb()
        assert isinstance(error.value, ns.UsageError if found is None else ns.CorruptFileError)
        assert error.value.found == found
        assert helps in str(error.value.hint)
    assert not os.path.exists("new")


def test_another_kind_where_scores_or_a_selection_is_wanted(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for load, given, helps in (
        (ns.Scores.load, "neuron_patch.safetensors", "diff BASE TUNED -o SCORES"),
        (ns.Scores.load, ".", "name the file in it: ./scores.safetensors"),
        (ns.Selection.load, "scores.safetensors", "select scores.safetensors"),
        (ns.Selection.load, "tuned", "select SCORES"),
        (ns.Selection.load, ".", "name the file in it: ./selection.safetensors"),
    ):
        with pytest.raises(ns.NeftError) as error:
            load(given)
        assert helps in str(error.value.hint), given


def test_another_kind_where_a_checkpoint_is_wanted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for given, kind, helps in (
        ("neuron_patch.safetensors", "a neuron patch", "neftsurgery apply BASE neuron_patch.safetensors"),
        ("scores.safetensors", "a scores file", "neftsurgery inspect scores.safetensors"),
        ("selection.safetensors", "a selection", "neftsurgery inspect selection.safetensors"),
    ):
        for verb in (
            lambda given=given: ns.diff("base", given),
            lambda given=given: ns.diff(given, "tuned"),
            lambda given=given: ns.apply(given, "neuron_patch.safetensors", out="new"),
        ):
            with pytest.raises(ns.UsageError, match="expected a checkpoint") as error:
                verb()
            assert error.value.found == kind
            assert helps in str(error.value.hint)
        assert ns.inspect(given).kind == kind.split()[-1 if kind != "a scores file" else 1]
