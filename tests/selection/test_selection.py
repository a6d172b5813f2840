"""Selections as values and as files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from support import raw_file

from neftsurgery import CorruptFileError, Selection, UsageError
from neftsurgery.neurons.layout import Layout
from neftsurgery.neurons.vectors import check_index
from neftsurgery.selection.selection import Chosen, index_dtype
from neftsurgery.tensors.header import TensorInfo


def chosen(
    name: str, shape: tuple[int, ...], axes: tuple[int, ...], index: list[int], dtype: str = "F32"
) -> Chosen:
    return Chosen(TensorInfo(name, dtype, shape), Layout(shape, axes), np.array(index, np.int64))


@pytest.fixture
def selection() -> Selection:
    return Selection(
        {
            "a.bias": chosen("a.bias", (6,), (0,), [1, 4]),
            "a.weight": chosen("a.weight", (6, 9), (0,), [1, 4]),
            "experts": chosen("experts", (3, 4, 5), (0, 2), [0, 7, 14], "BF16"),
            "kernel": chosen("kernel", (7, 8), (1,), [7], "F8_E4M3"),
        },
        {"score": "cosine", "captured": 0.25, "followers": ["a.bias"], "budget": {"neurons": "3%"}},
    )


def test_counts(selection):
    assert len(selection) == selection.neurons == 2 + 3 + 1  # the bias only follows
    assert selection.parameters == 2 + 2 * 9 + 3 * 4 + 7
    assert selection.counts == {"a.weight": 2, "experts": 3, "kernel": 1}
    assert [one.info.name for one in selection] == ["a.bias", "a.weight", "experts", "kernel"]


def assert_equal(found: Selection, expected: Selection) -> None:
    assert list(found.tensors) == list(expected.tensors)
    assert found.facts == expected.facts
    for name, one in expected.tensors.items():
        assert (found.tensors[name].info, found.tensors[name].layout) == (one.info, one.layout)
        assert found.tensors[name].index.dtype == np.int64
        np.testing.assert_array_equal(found.tensors[name].index, one.index)


def test_saved_and_loaded_it_is_the_same(selection, tmp_path):
    selection.save(tmp_path / "s.safetensors")
    assert_equal(Selection.load(tmp_path / "s.safetensors"), selection)
    Selection.load(tmp_path / "s.safetensors").save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_the_file_is_as_the_contract_says(selection, tmp_path):
    path = tmp_path / "s.safetensors"
    selection.save(path)
    entries = load_file(path)
    assert {name: (str(v.dtype), v.tolist()) for name, v in entries.items()} == {
        "a.bias:index": ("int32", [1, 4]),
        "a.weight:index": ("int32", [1, 4]),
        "experts:index": ("int32", [0, 7, 14]),
        "kernel:index": ("int32", [7]),
    }
    with safe_open(path, "numpy") as file:
        content = json.loads(file.metadata()["neuron_selection"])
    assert content["version"] == 1
    assert content["score"] == "cosine"
    assert content["tensors"]["experts"] == {"shape": [3, 4, 5], "dtype": "BF16", "neuron_axes": [0, 2]}


def test_an_existing_file_is_replaced_only_by_force(selection, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        selection.save(path)
    assert path.read_text() == "precious"
    selection.save(path, force=True)
    assert_equal(Selection.load(path), selection)
    with pytest.raises(UsageError, match="no such file"):
        Selection.load(tmp_path / "absent.safetensors")


def test_index_type():
    assert [index_dtype(count) for count in (1, 1 << 31, (1 << 31) + 1)] == ["I32", "I32", "I64"]


def test_wide_indices_are_kept(tmp_path):
    """Past 2**31 neurons; and I64 in another program's file of a small tensor is read as well."""
    shape = ((1 << 31) + 5, 2)
    wide = Selection({"w": chosen("w", shape, (0,), [3, (1 << 31) + 4])}, {})
    wide.save(tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")["w:index"].dtype == np.int64
    assert_equal(Selection.load(tmp_path / "w.safetensors"), wide)
    small = {"tensors": {"w": {"shape": [4, 2], "dtype": "F32", "neuron_axes": [0]}}, "version": 1}
    path = by_hand(tmp_path / "i64.safetensors", small, np.array([0, 3], np.int64))
    assert Selection.load(path).tensors["w"].index.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        ([], None),
        ([0, 1, 9], None),
        ([-1, 3], "out of range"),
        ([3, 10], "out of range"),
        ([3, 3], "ascending"),
        ([4, 3], "ascending"),
        ([0, 5, 4, 9], "ascending"),
    ],
)
def test_check_index(index, wrong):
    found = check_index(np.array(index, np.int64), 10)
    assert found is None if wrong is None else wrong in str(found)


# Files of others, and damaged ones.


def by_hand(path, content: object, index: np.ndarray, name: str = "w:index"):
    kinds = {"i": "I", "u": "U", "f": "F"}
    kind = f"{kinds[index.dtype.kind]}{8 * index.itemsize}"
    entries = [(name, kind, list(index.shape), index.tobytes())]
    text = content if isinstance(content, str) else json.dumps(content)
    return raw_file(path, entries, {"neuron_selection": text})


GOOD = {"version": 1, "tensors": {"w": {"shape": [4, 2], "dtype": "F32", "neuron_axes": [0]}}}


def test_the_least_there_can_be(tmp_path):
    found = Selection.load(by_hand(tmp_path / "s.safetensors", GOOD, np.array([1, 3], np.int32)))
    assert found.tensors["w"].index.tolist() == [1, 3]
    assert found.facts == {}
    none = Selection.load(by_hand(tmp_path / "n.safetensors", GOOD, np.array([], np.int32)))
    assert (len(none), dict(none.tensors)) == (0, {})


def entry(**changes: object) -> dict[str, object]:
    described = {**GOOD["tensors"]["w"], **changes}
    return {"version": 1, "tensors": {"w": {k: v for k, v in described.items() if v is not ...}}}


@pytest.mark.parametrize(
    ("content", "index", "why"),
    [
        ("", [1], "not valid JSON"),
        ("[" * 100_000, [1], "not valid JSON"),
        ("[]", [1], "not an object"),
        ({"version": 1}, [1], "not an object with tensors"),
        ({"version": 1, "tensors": []}, [1], "not an object with tensors"),
        ({"tensors": {}}, [1], "no version"),
        ({"version": "1", "tensors": {}}, [1], "no version"),
        ({"version": True, "tensors": {}}, [1], "no version"),
        ({"version": 0, "tensors": {}}, [1], "no version"),
        ({"version": 2, "tensors": {}}, [1], "newer version"),
        ({"version": 1, "tensors": {"w": None}}, [1], "not an object"),
        (entry(shape=...), [1], "make no sense"),
        (entry(shape=[4, -2]), [1], "make no sense"),
        (entry(shape=[4.0, 2]), [1], "make no sense"),
        (entry(shape="42"), [1], "make no sense"),
        (entry(shape=[4, 1 << 63]), [1], "make no sense"),
        (entry(dtype="F31"), [1], "make no sense"),
        (entry(dtype=[1]), [1], "make no sense"),
        (entry(dtype={}), [1], "make no sense"),
        (entry(dtype="F4"), [1], "whole bytes"),
        (entry(neuron_axes=[2]), [1], "not ascending axes"),
        (entry(neuron_axes=[0, 0]), [1], "not ascending axes"),
        (entry(neuron_axes=[1, 0]), [1], "not ascending axes"),
        (entry(neuron_axes=0), [1], "make no sense"),
        (entry(shape=[0, 2]), [0], "out of range"),
        (GOOD, [4], "out of range"),
        (GOOD, [-1], "out of range"),
        (GOOD, [2, 1], "ascending"),
        (GOOD, [1, 1], "ascending"),
        (GOOD, [[1]], "its index is missing"),
        (GOOD, np.array([1], np.float32), "its index is missing"),
        (GOOD, np.array([1], np.uint8), "its index is missing"),
        ({"version": 1, "tensors": {"v": GOOD["tensors"]["w"]}}, [1], "its index is missing"),
    ],
)
def test_damaged_files(tmp_path, content, index, why):
    array = index if isinstance(index, np.ndarray) else np.array(index, np.int32)
    path = by_hand(tmp_path / "s.safetensors", content, array)
    with pytest.raises(CorruptFileError, match=why) as error:
        Selection.load(path)
    assert error.value.file == str(path)


def test_other_files(selection, tmp_path):
    path = raw_file(tmp_path / "plain.safetensors", [("w", "F32", [1], bytes(4))])
    with pytest.raises(CorruptFileError, match="not a selection"):
        Selection.load(path)
    selection.save(path, force=True)
    whole = path.read_bytes()
    for cut in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFileError):
            Selection.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptFileError):
        Selection.load(path)


SCALARS = [st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)]
SCALARS += [st.sampled_from(["w", "F32", "BF16", "I64", "F4", "w:index"])]
KEYS = st.sampled_from(["w", "shape", "x"])
JSON = st.recursive(
    st.one_of(SCALARS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
PLACES = ["version", "tensors", "followers", "score", "tensors/w", "tensors/v"]
PLACES += [f"tensors/w/{key}" for key in ("shape", "dtype", "neuron_axes")]


def replaced(content: dict[str, object], place: str, value: object) -> dict[str, object]:
    copy = json.loads(json.dumps(content))
    *path, last = place.split("/")
    inside = copy
    for key in path:
        inside = inside[key]
    inside[last] = value
    return copy


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON, index=st.lists(st.integers(-2, 5), max_size=3))
@example(place="followers", value=5, index=[1])
@example(place="followers", value=[["w"]], index=[1])
@example(place="tensors/w/dtype", value=["F32"], index=[1])
def test_no_content_raises_anything_else(tmp_path, place, value, index):
    path = by_hand(tmp_path / "s.safetensors", replaced(GOOD, place, value), np.array(index, np.int32))
    try:
        found = Selection.load(path)
    except CorruptFileError:
        return
    assert found.neurons >= 0
    assert found.parameters >= 0
    assert set(found.counts) <= {"w"}
