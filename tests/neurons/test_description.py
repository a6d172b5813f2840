"""Descriptions of tensors in our files are read, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from document_support import carrying
from hypothesis import given
from hypothesis import strategies as st

from neftsurgery.errors import CorruptFileError
from neftsurgery.neurons.layout import Layout, described_tensor
from neftsurgery.tensors.header import TensorInfo


@pytest.mark.parametrize(
    ("shape", "axes"),
    [([3, 4], [0]), ([3, 4], [1]), ([2, 3, 4], [0, 2]), ([], []), ([0, 1 << 62], [1]), ([3], [])],
)
def test_a_described_tensor(tmp_path: Path, shape: list[int], axes: list[int]) -> None:
    entry = {"shape": shape, "dtype": "F16", "neuron_axes": axes, "more": 1}
    with carrying(tmp_path, None) as file:
        info, layout = described_tensor(file, "patch", "w", entry)
    assert info == TensorInfo("w", "F16", tuple(shape))
    assert layout == Layout(tuple(shape), tuple(axes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": None}, "make no sense"),
        ({"shape": 3}, "make no sense"),
        ({"shape": "34"}, "make no sense"),
        ({"shape": {"0": 3}}, "make no sense"),
        ({"shape": [3, -4]}, "make no sense"),
        ({"shape": [3, 4.0]}, "make no sense"),
        ({"shape": [3, True]}, "make no sense"),
        ({"shape": [3, "4"]}, "make no sense"),
        ({"shape": [3, [4]]}, "make no sense"),
        ({"shape": [3, 1 << 63]}, "make no sense"),
        ({"neuron_axes": None}, "make no sense"),
        ({"neuron_axes": 0}, "make no sense"),
        ({"neuron_axes": [False]}, "make no sense"),
        ({"neuron_axes": [-1]}, "make no sense"),
        ({"neuron_axes": [2]}, "not ascending axes of shape"),
        ({"neuron_axes": [1, 0]}, "not ascending axes of shape"),
        ({"neuron_axes": [0, 0]}, "not ascending axes of shape"),
        ({"dtype": None}, "make no sense"),
        ({"dtype": "float32"}, "make no sense"),
        ({"dtype": ["F32"]}, "make no sense"),
        ({"dtype": {"F32": None}}, "make no sense"),
        ({"dtype": "F4"}, "whole bytes"),
        ({"dtype": "F6_E2M3"}, "whole bytes"),
    ],
    ids=str,
)
def test_a_tensor_described_badly(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    entry = {"shape": [3, 4], "dtype": "F32", "neuron_axes": [0]} | change
    with carrying(tmp_path, None) as file:
        with pytest.raises(CorruptFileError, match=reason) as error:
            described_tensor(file, "patch", "w", entry)
        assert (error.value.tensor, error.value.file) == ("w", str(tmp_path / "p.safetensors"))
        entry = {key: value for key, value in entry.items() if key not in change}
        with pytest.raises(CorruptFileError, match="missing"):
            described_tensor(file, "patch", "w", entry)


@pytest.mark.parametrize("entry", [None, [], "F32", 7])
def test_a_description_that_is_no_object(tmp_path: Path, entry: object) -> None:
    with carrying(tmp_path, None) as file, pytest.raises(CorruptFileError, match="not an object"):
        described_tensor(file, "patch", "w", entry)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional={"shape": JSON, "dtype": JSON, "neuron_axes": JSON}))
def test_any_description_is_read_or_refused(entry: dict[str, object]) -> None:
    file = type("File", (), {"path": Path("p.safetensors")})()
    try:
        info, layout = described_tensor(file, "patch", "w", entry)
    except CorruptFileError:
        return
    assert (list(info.shape), info.dtype, list(layout.axes)) == (
        entry["shape"],
        entry["dtype"],
        entry["neuron_axes"],
    )
