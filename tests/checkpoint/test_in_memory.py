"""Tensors in memory are read like a file of the safetensors package that holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.in_memory import TensorsInMemory
from neftsurgery.checkpoint.provenance import fingerprint

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_tensors_are_their_file(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 32), dtype=torch.uint8, generator=generator)
    tensors = {
        "a": raw.view(dtype).contiguous(),
        "b": raw.view(dtype).t().contiguous()[:3],
        "empty": raw.view(dtype)[:0].contiguous(),
        "scalar": raw.view(dtype).flatten()[0].clone(),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    file = Checkpoint.open(tmp_path / "t.safetensors")
    found = TensorsInMemory(tensors | {"b": raw.view(dtype).t()[:3]}, "t")  # strided, too
    assert dict(found.tensors) == dict(file.tensors)
    assert fingerprint(found) == fingerprint(file)
    assert sum(info.nbytes for info in found.tensors.values()) == file.nbytes
    for start, size in ((0, 5), (3, 7), (90, 6)):
        parts = [bytearray(size), bytearray(size)]
        for side, part in zip((file, found), parts, strict=True):
            side.read_into("a", start, memoryview(part))
        assert parts[0] == parts[1]


def test_numpy_arrays_of_any_order_and_strides() -> None:
    array = np.arange(24, dtype=">f4").reshape(4, 6)
    found = TensorsInMemory({"a": array, "f": np.asfortranarray(array), "s": array[::2, ::-1]}, "t")
    for name, value in (("a", array), ("f", array), ("s", array[::2, ::-1])):
        buffer = bytearray(value.size * 4)
        found.read_into(name, 0, memoryview(buffer))
        np.testing.assert_array_equal(np.frombuffer(buffer, "<f4").reshape(value.shape), value)


@pytest.mark.parametrize("value", [3, "text", np.array(["a"]), [1.0]])
def test_what_is_no_tensor_is_refused(value: object) -> None:
    with pytest.raises(ns.UsageError, match="not a tensor of numpy or torch"):
        TensorsInMemory({"a": value}, "t")


def test_memory_and_files_do_not_mix(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float32)}
    with pytest.raises(ns.UsageError, match="not compared"):
        ns.extract(tensors, tmp_path, lossless=True)
    with pytest.raises(ns.UsageError, match="lossless"):
        ns.extract(tensors, tensors, neurons=1)  # type: ignore[call-overload]
