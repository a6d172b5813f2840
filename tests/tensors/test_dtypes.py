"""The table of element types, against the safetensors package, numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import deserialize
from test_floats import TORCH

from neftsurgery.tensors.dtypes import DTYPES

WHOLE = [dtype for dtype in DTYPES.values() if dtype.bits % 8 == 0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_package_knows_the_type_and_its_size(dtype) -> None:
    size = dtype.nbytes(8)
    header = f'{{"t":{{"dtype":"{dtype.name}","shape":[8],"data_offsets":[0,{size}]}}}}'.encode()
    ((name, found),) = deserialize(len(header).to_bytes(8, "little") + header + bytes(size))
    assert (name, found["dtype"], found["shape"]) == ("t", dtype.name, [8])


@pytest.mark.parametrize("dtype", WHOLE, ids=lambda dtype: dtype.name)
def test_numpy_types_have_the_size_and_the_kind(dtype) -> None:
    assert dtype.carrier.itemsize == dtype.itemsize
    if dtype.native is None:
        with pytest.raises(ValueError, match=f"numpy has no type for {dtype.name}"):
            _ = dtype.numpy
        return
    assert dtype.numpy.itemsize == dtype.itemsize
    assert dtype.numpy.newbyteorder("<") == dtype.numpy
    kinds = {"f": "float", "i": "integer", "u": "integer", "b": "bool", "c": "complex"}
    assert dtype.kind == kinds[dtype.numpy.kind]


@pytest.mark.parametrize("name", TORCH)
def test_float_formats_are_torchs(name) -> None:
    dtype = DTYPES[name]
    format = dtype.format
    assert format is not None

    def value(code: int) -> float:
        raw = np.array([code], np.uint64).astype(dtype.carrier).view(np.uint8)
        return float(torch.from_numpy(raw).view(TORCH[name]).to(torch.float64))

    one = format.bias << format.fraction_bits
    assert (value(one), value(one + 1)) == (1, 1 + 2.0**-format.fraction_bits)
    assert value(1 << format.fraction_bits) == 2.0 ** (1 - format.bias)
    assert value(format.nonfinite - 1) == torch.finfo(TORCH[name]).max
    beyond = value(format.nonfinite)
    assert beyond == np.inf if format.infinity else np.isnan(beyond)


def test_only_floats_have_a_format() -> None:
    assert {dtype.name for dtype in DTYPES.values() if dtype.kind == "float"} == set(TORCH)
    assert all((dtype.format is not None) == (dtype.kind == "float") for dtype in DTYPES.values())


def test_types_that_share_bytes_have_no_size_of_their_own() -> None:
    assert [DTYPES[name].nbytes(8) for name in ("F4", "F6_E2M3")] == [4, 6]
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        _ = DTYPES["F4"].itemsize
    with pytest.raises(KeyError):
        DTYPES["F128"]
