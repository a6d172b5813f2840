"""Vectors of neurons in live weights against their definition, and their bytes against numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tuning_support import vectors

from neftsurgery.live.weights import (
    FLOAT_DTYPES,
    can_represent,
    copy_into,
    equal_vectors,
    from_bytes,
    full_tensor,
    is_plain,
    read_vectors,
    to_bytes,
    torch_dtype,
    write_vectors,
)
from neftsurgery.neurons.layout import Layout
from neftsurgery.neurons.vectors import blocks
from neftsurgery.tensors.header import TensorInfo

LAYOUTS: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "rows": ((5, 3), [0]),
    "columns": ((3, 5), [1]),
    "elements": ((5,), [0]),
    "kernels": ((5, 2, 3), [0]),
    "experts": ((2, 3, 4), [0, 1]),
    "experts, transposed": ((2, 4, 3), [0, 2]),
}


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS.values(), ids=LAYOUTS)
def test_reading_and_writing(shape: tuple[int, ...], axes: list[int]) -> None:
    torch.manual_seed(0)
    weight, index = torch.randn(shape), torch.tensor([0, 3, 4])
    layout, before = Layout.of(shape, axes), weight.clone()
    read = read_vectors(weight, layout, index)
    assert torch.equal(read, vectors(weight, axes, [0, 3, 4]))
    assert read.is_contiguous()
    write_vectors(weight, layout, index, read.double() + 1)
    count = layout.count
    rest = [n for n in range(count) if n not in (0, 3, 4)]
    assert torch.equal(vectors(weight, axes, rest), vectors(before, axes, rest))
    assert torch.equal(vectors(weight, axes, [0, 3, 4]), (read.double() + 1).float())
    write_vectors(weight, layout, index, read)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("name", "kind"), [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")])
def test_bytes(name: str, kind: str) -> None:
    values = torch.tensor([[1.5, -0.0], [float("inf"), 2**-14]])
    raw = to_bytes(values, name)
    assert raw.tobytes() == values.numpy().astype(kind).tobytes()
    assert raw.shape == (2, 2 * np.dtype(kind).itemsize)
    assert torch.equal(from_bytes(raw, name), values.to(torch_dtype(name)))


def test_bytes_of_bfloat16_are_the_upper_half_of_float32() -> None:
    values = torch.tensor([[1.5, -2.0, 0.15625]])
    raw = to_bytes(values, "BF16")
    assert raw.tobytes() == values.numpy().view("<u2")[:, 1::2].tobytes()
    assert torch.equal(from_bytes(raw, "BF16").float(), values)


def test_vectors_of_no_width_or_number() -> None:
    assert to_bytes(torch.empty(3, 0), "F32").shape == (3, 0)
    assert to_bytes(torch.empty(0, 3), "F32").shape == (0, 12)


def test_equality_is_of_bits() -> None:
    a = torch.tensor([[0.0, 1.0], [float("nan"), 2.0], [3.0, 4.0]])
    b = torch.tensor([[-0.0, 1.0], [float("nan"), 2.0], [3.0, 5.0]])
    assert equal_vectors(a, b).tolist() == [False, True, False]


@pytest.mark.parametrize("wide", sorted(FLOAT_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("narrow", sorted(FLOAT_DTYPES, key=str), ids=str)
def test_which_dtype_represents_which(wide: torch.dtype, narrow: torch.dtype) -> None:
    info = torch.finfo(narrow)
    values = torch.tensor([info.max, info.smallest_normal, 1 + info.eps], dtype=narrow)
    assert can_represent(wide, narrow) == torch.equal(values.to(wide).to(narrow), values)


PLAIN: dict[str, tuple[Any, bool]] = {
    "float32": (torch.ones(2), True),
    "a parameter": (torch.nn.Parameter(torch.ones(2)), True),
    "codes": (torch.ones(2, dtype=torch.int8), False),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), False),
}


@pytest.mark.parametrize(("weight", "plain"), PLAIN.values(), ids=PLAIN)
def test_plain_weights(weight: Any, plain: bool) -> None:
    assert is_plain(weight) is plain


def test_codes_have_no_float_dtype() -> None:
    assert torch_dtype("F8_E4M3") is None


def test_a_tensor_that_is_not_a_shard_is_its_own_whole() -> None:
    """Of shards, tests/tuning/test_distributed.py has two processes."""
    tensor = torch.nn.Parameter(torch.zeros(2, 2))
    assert full_tensor(tensor) is tensor
    copy_into(tensor, torch.ones(2, 2))
    assert torch.equal(tensor.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(("count", "width"), [(0, 5), (7, 0), (7, 1 << 30), (100, 1 << 20), (3, 4)])
def test_blocks_cover_all_vectors_once(count: int, width: int) -> None:
    layout = Layout((max(1, count), width), (0,))
    ranges = list(blocks(TensorInfo("a", "F32", layout.shape), layout, count))
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(count))
    assert all((stop - start) * width <= 1 << 24 or stop - start == 1 for start, stop in ranges)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_writing_is_exact_at_any_place_in_memory(dtype: torch.dtype, width: int, first: int) -> None:
    """Every bit, those of NaN too, and nothing beside; against numpy."""
    size = dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 256, (first + 5 * width) * size, dtype=np.uint8)
    new = np.random.default_rng(1).integers(0, 256, (2, width * size), dtype=np.uint8)
    expected = raw.copy()
    expected[first * size :].reshape(5, -1)[[1, 4]] = new
    memory = torch.from_numpy(raw).view(dtype)
    weight = torch.nn.Parameter(memory[first:].view(5, width))
    rows = torch.from_numpy(new).view(dtype)
    with torch.no_grad():
        write_vectors(weight, Layout.of((5, width), [0]), torch.tensor([1, 4]), rows)
    assert memory.view(torch.uint8).numpy().tobytes() == expected.tobytes()
    assert weight._version == 1
