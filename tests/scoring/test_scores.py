"""Scores files of both versions: selecting from anyone's, what a selection captures, and damaged ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import LLAMA_CONFIG, raw_file, write_folder

import neftsurgery as ns
from neftsurgery import CorruptFileError, MismatchError, Scores, Selection, UsageError

Content = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

KINDS = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint32": "U32",
}


def write(path: Path, content: object, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """A scores file as another program might write it."""
    text = content if isinstance(content, str) else json.dumps(content)
    entries = [(name, KINDS[str(a.dtype)], list(a.shape), a.tobytes()) for name, a in arrays.items()]
    return raw_file(path, entries, {"neuron_scores": text})


def described(shape: list[int], axes: tuple[int, ...] = (0,), dtype: str = "F32", **more: object) -> Content:
    return {"shape": shape, "dtype": dtype, "neuron_axes": list(axes), **more}


def least() -> tuple[Content, Arrays]:
    """Nothing but a vector per tensor and ``tensors``: all that selecting needs."""
    content = {"version": 1, "tensors": {"b": described([3, 4]), "a": described([2, 5], (1,), "BF16")}}
    arrays = {"a": [1, 5, 2, 5, np.nan], "b": [5, 7, 0]}
    return content, {name: np.array(values, np.float32) for name, values in arrays.items()}


def full() -> tuple[Content, Arrays]:
    """A weight with its bias, a weight without, an included norm, and tensors that are not scored."""
    content = {
        "version": 1,
        "score": "cosine",
        "anatomy": "rows",
        "parameters": 1000,
        "nonfinite": 1,
        "base": {"name": "base", "fingerprint": "xxh3-128:1"},
        "tuned": {"name": "tuned", "fingerprint": "xxh3-128:2"},
        "tensors": {
            "l.0.w": described([4, 3], bias="l.0.b", layer="l.0"),
            "l.1.w": described([5, 6], layer="l.1", bias="l.1.b"),
        },
        "unscored": {
            "l.0.b": described([4], reason="bias", base_sq=1.0, delta_sq=3.0, changed=2, included=False),
            "norm": described([3], reason="norm", base_sq=1.0, delta_sq=2.0, changed=1, included=True),
            "embed": {**described([9, 2]), "reason": "embedding", "delta_sq": 15.0, "changed": 3},
        },
    }
    arrays = {
        "l.0.w": np.array([0.1, 0.4, np.nan, 0.2], np.float32),
        "l.0.w:delta_sq": np.array([1.0, 4.0, np.nan, 2.0]),
        "l.0.w:changed": np.array([3, 0, 1, 2]),
        "l.1.w": np.array([0.3, 0.0, 0.3, 0.5, 0.1], np.float32),
        "l.1.w:delta_sq": np.array([3.0, 0.0, 3.0, 6.0, 1.0]),
        "l.1.w:changed": np.array([6, 0, 6, 1, 2]),
        "l.0.b:delta_sq": np.array([1.0, 2.0, 0.0, 0.0]),
        "l.0.b:changed": np.array([1, 1, 0, 0]),
        "norm:delta_sq": np.array([0.0, 2.0, 0.0]),
        "norm:changed": np.array([0, 1, 0]),
    }
    return content, arrays


def by_layers() -> tuple[Content, Arrays]:
    """As `full`, without biases."""
    content, arrays = full()
    for tensor in content["tensors"].values():
        tensor.pop("bias")
    return content, arrays


def by_units() -> tuple[Content, Arrays]:
    """Three units over two tensors, one of them in both twice; and a neuron that is in none."""
    tensors = {"x": described([4, 3], layer="m.0"), "y": described([2, 4], (1,), layer="m.0")}
    content = {"version": 1, "tensors": tensors}
    arrays = {
        "x": np.array([0.1, 0.9, 0.1, 0.4], np.float32),
        "x:unit": np.array([0, 1, 0, 2]),
        "y": np.array([0.9, 0.1, 0.7, 0.4], np.float32),
        "y:unit": np.array([1, 0, -1, 2]),
    }
    return content, arrays


def compact(content: Content, arrays: Arrays) -> tuple[Content, Arrays]:
    """The same scores in version 2: an array per kind, the tensors one after the other in order of names.

    Sums that not all tensors have, or that some other sum lacks, are filled with zeros.
    """
    counts = {name: len(arrays[name]) for name in sorted(content["tensors"])}
    elements = {name: len(arrays[f"{name}:changed"]) for name in ("l.0.b", "norm") if "unscored" in content}
    content.get("unscored", {}).get("embed", {}).pop("neuron_axes", None)  # it has no records
    kinds = {name.rpartition(":")[2] for name in arrays if ":" in name}
    if kinds - {"unit"}:
        kinds |= {"base_sq", "delta_sq", "dot", "changed"}
    found: Arrays = {"score": np.concatenate([arrays[name] for name in counts])}
    for kind in kinds:
        of = counts | dict(sorted(elements.items())) if kind in ("delta_sq", "changed") else counts
        dtype = {"changed": "u4", "unit": "i8"}.get(kind, "f8")
        parts = [arrays.get(f"{name}:{kind}", np.zeros(count)).astype(dtype) for name, count in of.items()]
        found[kind] = np.concatenate(parts)
    numbers = {name: number for number, name in enumerate(content["tensors"])}
    described = {"descriptions": list(content["tensors"].values()), "tensors": numbers}
    return {**content, "version": 2, **described}, found


@pytest.fixture
def load_as_it_is(tmp_path):
    def make(content: object, arrays: Mapping[str, NDArray[Any]]) -> Scores:
        return Scores.load(write(tmp_path / "scores.safetensors", content, arrays))

    return make


@pytest.fixture(params=[1, 2])
def load(request, load_as_it_is):
    return lambda content, arrays: load_as_it_is(
        *((content, arrays) if request.param == 1 else compact(content, arrays))
    )


def counts(selection: Selection) -> dict[str, list[int]]:
    return {name: chosen.index.tolist() for name, chosen in selection.tensors.items()}


def test_selecting_from_the_least_there_can_be(load):
    """Ties break by name and then index; a NaN is no candidate and no neuron of a share."""
    scores = load(*least())
    assert list(scores.tensors) == ["a", "b"]
    assert counts(scores.select(neurons=1)) == {"b": [1]}
    assert counts(scores.select(neurons=2)) == {"a": [1], "b": [1]}
    assert counts(scores.select(neurons=3)) == {"a": [1, 3], "b": [1]}
    assert counts(scores.select(neurons="50%")) == {"a": [1, 3], "b": [0, 1]}  # of 7
    assert counts(scores.select(neurons=100)) == {"a": [0, 1, 2, 3], "b": [0, 1, 2]}
    assert counts(scores.select(neurons=1, policy="reversed")) == {"b": [2]}
    assert counts(scores.select(threshold=2)) == {"a": [1, 3], "b": [0, 1]}
    assert (scores.parameters, scores.neurons, scores.anatomy, scores.score) == (22, 8, "unknown", "unknown")
    facts = scores.select(neurons=3).facts
    assert facts["budget"] == {"neurons": 3}
    assert not {"captured", "captured_scored", "base"} & facts.keys()
    assert scores.sums("a", "delta_sq") is None


def test_parameters_of_the_model_are_counted(load):
    content, arrays = least()
    scores = load({**content, "parameters": 100}, arrays)
    assert counts(scores.select(params="10%")) == {"a": [1, 3], "b": [1]}  # 4, 6, 8; the next would be 12
    assert counts(scores.select(params="12%")) == {"a": [1, 3], "b": [0, 1]}
    assert counts(scores.select(params=7)) == {"a": [1], "b": [1]}


def test_changed_needs_the_counts(load):
    with pytest.raises(UsageError, match="tensor a: changed needs") as error:
        load(*least()).select(changed=True)
    assert error.value.tensor == "a"


def test_nothing_to_choose_from(load):
    content, arrays = least()
    none = {name: np.full_like(values, np.nan) for name, values in arrays.items()}
    with pytest.raises(MismatchError, match="no neuron can be scored"):
        load(content, none).select(neurons=1)


# With the sums.


def test_captured(load):
    scores = load(*full())
    whole = 7 + 13 + 3 + 2 + 15
    selection = scores.select(neurons=3)
    assert counts(selection) == {"l.0.w": [1], "l.1.w": [0, 3]}
    assert selection.facts["captured"] == pytest.approx((4 + 3 + 6) / whole)
    assert selection.facts["captured_scored"] == pytest.approx((4 + 3 + 6) / 20)
    assert selection.facts["base"] == {"name": "base", "fingerprint": "xxh3-128:1"}
    assert selection.facts["tuned"]["name"] == "tuned"
    with_bias = scores.select(neurons=3, with_bias=True)
    assert counts(with_bias) == {"l.0.b": [1], "l.0.w": [1], "l.1.w": [0, 3]}
    assert with_bias.facts["captured"] == pytest.approx((4 + 3 + 6 + 2) / whole)
    assert with_bias.facts["captured_scored"] == pytest.approx((4 + 3 + 6) / 20)
    assert with_bias.facts["followers"] == ["l.0.b"]
    assert with_bias.neurons == 3
    assert with_bias.parameters == 3 + 6 + 6 + 1


def test_changed(load):
    """Bits differ: also where a neuron has no score; included tensors too, and a bias only if asked for."""
    scores = load(*full())
    selection = scores.select(changed=True)
    assert counts(selection) == {"l.0.w": [0, 2, 3], "l.1.w": [0, 2, 3, 4], "norm": [1]}
    assert selection.facts["captured"] == pytest.approx((3 + 13 + 2) / 40)
    assert selection.facts["captured_scored"] == pytest.approx((3 + 13) / 20)
    assert selection.neurons == 8
    with_bias = scores.select(changed=True, with_bias=True)
    # The bias of every changed neuron, and every changed bias.
    assert counts(with_bias) == counts(selection) | {"l.0.b": [0, 1, 2, 3]}
    assert with_bias.facts["captured"] == pytest.approx((3 + 13 + 2 + 3) / 40)
    assert with_bias.counts == selection.counts


def test_like(load):
    scores = load(*full())
    chosen = scores.select(neurons=4, with_bias=True)
    assert chosen.counts == {"l.0.w": 1, "l.1.w": 3}
    for like in (chosen, chosen.counts):
        control = scores.select(like=like, policy="random", seed=5, with_bias=True)
        assert control.counts == chosen.counts
        assert 2 not in control.tensors["l.0.w"].index  # no score
        assert control.facts["seed"] == 5
        assert control.facts["budget"]["like"] == "the counts per tensor of another selection"
        assert control.facts["policy"] == "random"
    assert counts(scores.select(like={"l.1.w": 2})) == {"l.1.w": [0, 3]}
    assert counts(scores.select(like=chosen, policy="reversed"))["l.1.w"] == [0, 1, 4]
    with pytest.raises(UsageError, match="not scored here"):
        scores.select(like={"elsewhere": 1})
    with pytest.raises(UsageError, match="more neurons than have a score"):
        scores.select(like={"l.0.w": 4})


def test_pools(load):
    scores = load(*full())
    assert counts(scores.select(neurons="25%", per="layer")) == {"l.0.w": [1], "l.1.w": [3]}
    assert counts(scores.select(neurons=3, per="tensor")) == {"l.0.w": [1], "l.1.w": [0, 3]}
    assert counts(scores.select(neurons=3, max_per_tensor=1)) == {"l.0.w": [1], "l.1.w": [3]}


def test_nothing_changed_captures_nothing(load):
    content, arrays = full()
    for entry in content["unscored"].values():
        entry["delta_sq"] = 0.0
    zeros = {name: values * 0 if name.endswith(":delta_sq") else values for name, values in arrays.items()}
    zeros["l.0.w:delta_sq"] = np.zeros(4)
    facts = load(content, zeros).select(neurons=2).facts
    assert "captured" not in facts
    assert "captured_scored" not in facts


def test_sums_beyond_float64_capture_no_share(load):
    content, arrays = full()
    arrays["l.0.w:delta_sq"] = np.array([np.inf, 1, 1, 1])
    facts = load(content, arrays).select(neurons=2).facts
    assert "captured" not in facts


def test_units(load):
    scores = load(*by_units())
    assert scores.by_unit
    assert scores.units == 3
    assert counts(scores.select(neurons=1)) == {"x": [1], "y": [0]}
    assert counts(scores.select(neurons=2)) == {"x": [1, 3], "y": [0, 3]}
    assert counts(scores.select(neurons="100%")) == {"x": [0, 1, 2, 3], "y": [0, 1, 3]}
    assert counts(scores.select(params=9)) == {"x": [1], "y": [0]}  # 3 + 2 each
    assert counts(scores.select(params=10)) == {"x": [1, 3], "y": [0, 3]}
    assert counts(scores.select(neurons=1, policy="reversed")) == {"x": [0, 2], "y": [1]}
    for option in ({"per": "tensor"}, {"max_per_tensor": 1}):
        with pytest.raises(UsageError, match="does not go with anatomy='units'"):
            scores.select(neurons=1, **option)
    with pytest.raises(UsageError, match="does not go with anatomy='units'"):
        scores.select(like={"x": 1})


def test_units_tie_by_their_first_member(load):
    content, arrays = by_units()
    arrays["x"][:] = arrays["y"][:] = 0.5
    arrays["x:unit"], arrays["y:unit"] = np.array([2, 0, 2, 1]), np.array([0, 2, -1, 1])
    assert counts(load(content, arrays).select(neurons=1)) == {"x": [0, 2], "y": [1]}
    assert counts(load(content, arrays).select(neurons=2)) == {"x": [0, 1, 2], "y": [0, 1]}


def test_only_a_part_of_a_tensor_belongs(load):
    """Of a fused gate_up_proj under ``ffn`` only the up half, or every second row; the rest has no score."""
    content = {"version": 1, "tensors": {"gate_up": described([2, 4, 3], (0, 1), part=[1, 4, 2])}}
    arrays = {
        "gate_up": np.array([np.nan, 0.1, np.nan, 0.2, np.nan, 0.0, np.nan, 0.0], np.float32),
        "gate_up:changed": np.array([3, 1, 3, 0, 3, 0, 3, 2]),
    }
    scores = load(content, arrays)
    assert scores.neurons == 4
    assert counts(scores.select(changed=True)) == {"gate_up": [1, 7]}
    assert counts(scores.select(neurons="50%")) == {"gate_up": [1, 3]}


@pytest.mark.parametrize("make", [least, full, by_units])
def test_saved_and_loaded_it_is_the_same(load, make, tmp_path):
    with load(*make()) as scores:
        scores.save(tmp_path / "again.safetensors")
        with pytest.raises(UsageError, match="exists"):
            scores.save(tmp_path / "again.safetensors")
        with Scores.load(tmp_path / "again.safetensors") as again:
            assert (again.facts, again.tensors) == (scores.facts, scores.tensors)
            assert again.companion_biases == scores.companion_biases
            for name in scores.tensors:
                np.testing.assert_array_equal(again.values(name), scores.values(name))
            assert counts(again.select(neurons=2)) == counts(scores.select(neurons=2))
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "scores.safetensors").read_bytes()
        (tmp_path / "again.safetensors").write_text("precious")
        scores.save(tmp_path / "again.safetensors", force=True)
        Scores.load(tmp_path / "again.safetensors").close()


# Damage.


def change(place: str, value: object, make=full) -> tuple[Content, Arrays]:
    """The file of ``make`` with one thing in its document replaced; ``...`` removes it."""
    content, arrays = make()
    *path, last = place.split("/")
    inside = content
    for key in path:
        inside = inside[int(key) if isinstance(inside, list) else key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return content, arrays


def with_array(name: str, values: NDArray[Any] | None, make=full) -> tuple[Content, Arrays]:
    content, arrays = make()
    arrays.pop(name, None)
    return content, arrays if values is None else {**arrays, name: values}


DAMAGED = [
    ("", {}),
    ("null", {}),
    change("version", ...),
    change("version", 2),  # whose arrays are missing
    change("version", 3),
    change("tensors", ...),
    change("tensors", []),
    change("tensors/l.0.w", 5),
    change("tensors/l.0.w/shape", ...),
    change("tensors/l.0.w/shape", [5, 3]),
    change("tensors/l.0.w/shape", [4, 0]),
    change("tensors/l.0.w/shape", [4, 1 << 62]),
    change("tensors/l.0.w/shape", [4, 1 << 62, 1 << 62]),
    change("tensors/l.0.w/dtype", "F3"),
    change("tensors/l.0.w/dtype", ["F32"]),
    change("tensors/l.0.w/dtype", "F4"),
    change("tensors/l.0.w/neuron_axes", [1]),
    change("tensors/l.0.w/neuron_axes", [7]),
    change("tensors/l.0.w/neuron_axes", [True]),
    change("tensors/l.0.w/layer", 3),
    change("tensors/l.0.w/bias", 3),
    change("tensors/l.0.w/part", [0, 4]),
    change("tensors/l.0.w/part", [0, 4, 0]),
    change("tensors/l.0.w/part", [0, -4, 1]),
    change("tensors/l.0.w/part", "0:4"),
    change("tensors/l.0.w", described([12], (), part=[0, 1, 1])),
    change("tensors/absent", described([4, 3])),
    change("parameters", "many"),
    change("parameters", -1),
    change("parameters", True),
    change("nonfinite", [3]),
    change("unscored", []),
    change("unscored/embed", 7),
    change("unscored/embed/delta_sq", "much"),
    change("unscored/embed/delta_sq", -1.0),
    change("unscored/embed/delta_sq", 10**400),
    change("unscored/embed/delta_sq", float("nan")),
    change("unscored/l.0.b/shape", [5]),
    change("unscored/l.0.b/shape", ...),
    change("unscored/l.0.b/neuron_axes", []),
    change("unscored/l.1.w", described([5])),
    with_array("l.0.w", None),
    with_array("l.0.w", np.zeros(5, np.float32)),
    with_array("l.0.w", np.zeros((4, 1), np.float32)),
    with_array("l.0.w", np.zeros(4)),
    with_array("l.0.w:delta_sq", np.zeros(4, np.float32)),
    with_array("l.0.w:delta_sq", np.zeros(3)),
    with_array("l.0.w:changed", np.zeros(4, np.int32)),
    with_array("l.0.w:dot", np.zeros(1)),
    with_array("l.0.w:base_sq", np.zeros(4, np.float16)),
    with_array("l.0.b:changed", np.zeros(5, np.int64)),
    with_array("l.0.b:delta_sq", np.zeros(3)),
    with_array("l.0.b:delta_sq", np.zeros(4, np.float16)),
    with_array("x:unit", np.zeros(3, np.int64), by_units),
    with_array("x:unit", np.zeros(4, np.int32), by_units),
]


@pytest.mark.parametrize("case", range(len(DAMAGED)))
def test_damaged_files(load_as_it_is, case):
    with pytest.raises(CorruptFileError) as error:
        load_as_it_is(*DAMAGED[case])
    assert error.value.file.endswith("scores.safetensors")


def without(kind: str, make=full) -> tuple[Content, Arrays]:
    content, arrays = compact(*make())
    del arrays[kind]
    return content, arrays


def replaced(kind: str, values: NDArray[Any], make=full) -> tuple[Content, Arrays]:
    content, arrays = compact(*make())
    assert kind in arrays
    return content, {**arrays, kind: values}


def second(place: str, value: object, make=full) -> tuple[Content, Arrays]:
    """As `change`, in version 2."""
    return change(place, value, lambda: compact(*make()))


def also(group: str, name: str, value: object) -> tuple[Content, Arrays]:
    content, arrays = compact(*full())
    content[group][name] = value
    return content, arrays


DAMAGED_ARRAYS = [
    *(without(kind) for kind in ("score", "base_sq", "delta_sq", "dot", "changed")),
    second("version", 1),
    *(second("descriptions", value) for value in (..., None, [], {}, "ab", [1, 2], [[]])),
    *(second("tensors/l.1.w", value) for value in (..., -1, 2, 0.5, "0", None, [0], {})),
    second("descriptions/0/shape", [5, 3]),  # a bias has as many neurons
    second("descriptions/1/shape", [6, 6], by_layers),
    second("descriptions/1/shape", ...),
    second("descriptions/1/dtype", "F3"),
    second("descriptions/1/layer", 3),
    second("descriptions/1/part", "0:4"),
    second("unscored/norm/shape", [4]),
    second("unscored/norm", ...),
    second("unscored/embed/neuron_axes", [0]),
    second("unscored/norm/neuron_axes", None),
    second("unscored/norm/dtype", ...),
    second("anatomy", "units"),  # whose units are missing
    also("tensors", "more", 0),
    also("tensors", "norm", 0),  # scored, and not scored
    also("unscored", "more", described([1])),
    replaced("score", np.zeros(9)),
    replaced("score", np.zeros(8, np.float32)),
    replaced("score", np.zeros((9, 1), np.float32)),
    replaced("score", np.zeros(16, np.float32)),
    replaced("base_sq", np.zeros(16)),
    replaced("dot", np.zeros(9, np.float32)),
    replaced("delta_sq", np.zeros(9)),
    replaced("delta_sq", np.zeros(17)),
    replaced("changed", np.zeros(9, np.uint32)),
    replaced("changed", np.zeros(16, np.int64)),
    replaced("unit", np.zeros(7, np.int64), by_units),
    replaced("unit", np.zeros(8, np.int32), by_units),
]


@pytest.mark.parametrize("case", range(len(DAMAGED_ARRAYS)))
def test_damaged_arrays(load_as_it_is, case):
    with pytest.raises(CorruptFileError) as error:
        load_as_it_is(*DAMAGED_ARRAYS[case])
    assert error.value.file.endswith("scores.safetensors")


def test_an_array_of_another_length_is_told(load_as_it_is):
    with pytest.raises(CorruptFileError, match="its entry dot does not fit") as error:
        load_as_it_is(*replaced("dot", np.zeros(16)))
    assert (error.value.expected, error.value.found) == ("F64 [9]", "F64 [16]")
    assert str(error.value).count("dot") == 1  # named once


@pytest.mark.parametrize("kind", ["base_sq", "delta_sq"])
@pytest.mark.parametrize("name", ["l.0.w", "l.1.w"])
def test_squares_that_are_negative(load, tmp_path, kind, name):
    content, arrays = full()
    for one in content["tensors"]:
        for which in ("base_sq", "delta_sq", "dot"):
            arrays.setdefault(f"{one}:{which}", np.ones(len(arrays[one])))
    arrays[f"{name}:{kind}"][1] = -1e-3
    with load(content, arrays) as scores:
        assert scores.values(name)[1] in (np.float32(0.4), 0)
        with pytest.raises(CorruptFileError, match=f"{kind} is negative"):
            scores.sums(name, kind)
    with pytest.raises(CorruptFileError, match=f"{kind} is negative"):
        ns.inspect(tmp_path / "scores.safetensors")


def test_a_name_that_occurs_twice(tmp_path):
    content, arrays = compact(*least())
    text = json.dumps(content).replace('"a":', '"b":')
    with pytest.raises(CorruptFileError, match="the key 'b' occurs twice"):
        Scores.load(write(tmp_path / "s.safetensors", text, arrays))


def test_numbers_that_a_version_2_file_has_of_more(load_as_it_is):
    """Entries that a reader does not know may be there."""
    content, arrays = compact(*least())
    scores = load_as_it_is(content, {**arrays, "later": np.zeros(3), "a": np.zeros(2)})
    assert counts(scores.select(neurons=1)) == {"b": [1]}


def test_only_what_is_asked_for_is_read(load_as_it_is, tmp_path):
    """Selecting by score and reading counts leaves the sums alone, which may be lost with the file's end."""
    content, arrays = compact(*full())
    order = ["score", "changed", "delta_sq", "base_sq", "dot"]
    scores = load_as_it_is(content, {kind: arrays[kind] for kind in order})
    path = tmp_path / "scores.safetensors"
    status = path.stat()
    with open(path, "r+b") as file:
        file.truncate(status.st_size - 2 * 9 * 8)  # base_sq and dot are gone
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scores.values("l.0.w")[1] == np.float32(0.4)
    assert scores.sums("norm", "changed").tolist() == [0, 1, 0]
    assert [batch.sums["delta_sq"].sum() for batch in scores.batches("delta_sq")] == [20]
    with pytest.raises(CorruptFileError, match="ends too soon"):
        scores.sums("l.0.w", "dot")


@pytest.mark.parametrize(
    ("name", "values"),
    [("x:unit", None), ("x:unit", [0, 1, 2, 99]), ("x:unit", [0, 1, 2, -2]), ("y:unit", [0, 1, 2, 1 << 62])],
)
def test_damaged_units(load_as_it_is, name, values):
    scores = load_as_it_is(*with_array(name, None if values is None else np.array(values), by_units))
    with pytest.raises(CorruptFileError, match="unit"):
        scores.select(neurons=1)


def test_other_files(tmp_path):
    path = raw_file(tmp_path / "plain.safetensors", [("w", "F32", [1], bytes(4))])
    with pytest.raises(CorruptFileError, match="not a scores file"):
        Scores.load(path)
    path = write(tmp_path / "s.safetensors", *full())
    whole = path.read_bytes()
    for cut in (0, 5, 8, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFileError):
            Scores.load(path)


SCALARS = [st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)]
SCALARS += [st.sampled_from(["l.0.w", "l.0.b", "norm", "F32", "F8_E4M3", "I64", "F4"]), st.integers(0, 9)]
KEYS = st.sampled_from(["l.0.w", "l.0.b", "norm", "shape", "x"])
JSON = st.recursive(
    st.one_of(SCALARS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    "descriptions",
    "version",
    "score",
    "anatomy",
    "parameters",
    "nonfinite",
    "base",
    "tuned",
    "tensors",
    "unscored",
]
PLACES += [f"{group}/{name}" for group in ("tensors", "unscored") for name in ("l.0.w", "l.0.b", "norm")]
for tensor in ("tensors/l.0.w", "unscored/l.0.b", "unscored/norm", "unscored/embed"):
    PLACES += [f"{tensor}/{key}" for key in ("shape", "dtype", "neuron_axes", "layer", "bias", "part")]
    PLACES += [f"{tensor}/{key}" for key in ("included", "delta_sq", "reason")]
VECTORS = [None, "l.0.w", "l.0.w:changed", "l.0.w:unit", "l.0.b:changed", "norm:delta_sq", "embed:changed"]
BUDGETS = ({"neurons": 2}, {"params": "50%"}, {"changed": True}, {"neurons": 1, "per": "layer"})
ARRAYS = [None, "score", "base_sq", "delta_sq", "dot", "changed", "unit"]
NUMBERS = {1: None, 2: np.float32, 3: np.float64, 4: np.int64, 5: np.uint32}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(PLACES),
    value=JSON | st.lists(st.integers(0, 6), max_size=4),
    name=st.sampled_from(VECTORS + ARRAYS),
    length=st.integers(0, 6) | st.sampled_from([9, 16]),
    kind=st.sampled_from(sorted(NUMBERS)),
    version=st.integers(1, 2),
)
@example(place="unscored/embed", value=None, name=None, length=0, kind=1, version=1)
@example(place="tensors/l.0.w/bias", value="norm", name=None, length=0, kind=1, version=1)
@example(place="unscored/norm/included", value=[], name="norm:changed", length=3, kind=4, version=1)
@example(place="unscored/norm/shape", value=[1 << 62], name=None, length=0, kind=1, version=2)
@example(place="tensors/l.1.w", value=True, name="unit", length=9, kind=4, version=2)
def test_no_content_raises_anything_else(tmp_path, place, value, name, length, kind, version):
    """Whatever a file says, it is refused as damaged, or selected from."""
    if version == 1:
        content, arrays = change(place, value)
    else:
        content, arrays = second(place.replace("tensors/l.0.w/", "descriptions/0/"), value)
    if name is not None:
        number = NUMBERS[kind]
        arrays.pop(name, None)
        arrays |= {} if number is None else {name: np.arange(length).astype(number)}
    path = write(tmp_path / "mutated.safetensors", content, arrays)
    try:
        with Scores.load(path) as scores:
            assert scores.neurons >= 0
            for budget in BUDGETS:
                try:
                    selection = scores.select(**budget, with_bias=True)
                except (UsageError, MismatchError):  # a number too large, nothing to choose from
                    continue
                assert selection.parameters >= selection.neurons
                assert 0 <= selection.facts.get("captured", 0) <= 1
                selection.save(tmp_path / "selection.safetensors", force=True)
                assert counts(Selection.load(tmp_path / "selection.safetensors")) == counts(selection)
    except CorruptFileError:
        return


def test_only_the_scored_half_of_a_fused_tensor_counts_as_scored(tmp_path):
    """Under ffn the gate rows of a fused gate_up tensor are no neurons: not in captured_scored either."""
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (32, 8), "down_proj": (8, 16)}
    base = {f"model.layers.0.mlp.{n}.weight": rng.standard_normal(s).astype("f4") for n, s in shapes.items()}
    tuned = {n: a + rng.standard_normal(a.shape).astype("f4") for n, a in base.items()}
    for name, arrays in (("a", base), ("b", tuned)):
        write_folder(tmp_path / name, arrays, 1, {"model_type": "phi3", "num_attention_heads": 2})
    scores = ns.diff(tmp_path / "a", tmp_path / "b", anatomy="ffn")
    selection = scores.select(neurons="100%")
    assert selection.neurons == scores.neurons == 32
    assert selection.facts["captured_scored"] == 1
    delta = {n: ((tuned[n].astype("f8") - base[n]) ** 2).sum(1) for n in base}
    gate_up, down = (delta[f"model.layers.0.mlp.{n}.weight"] for n in shapes)
    expected = (gate_up[16:].sum() + down.sum()) / (gate_up.sum() + down.sum())
    assert selection.facts["captured"] == pytest.approx(expected, rel=1e-5)


def test_one_pattern_may_be_a_string(tmp_path, llama_arrays):
    for name, seed in (("a", 0), ("b", 1)):
        write_folder(tmp_path / name, llama_arrays(seed=seed), 1, LLAMA_CONFIG)
    sides = tmp_path / "a", tmp_path / "b"
    assert (
        ns.diff(*sides, exclude="*mlp*").tensors.keys() == ns.diff(*sides, exclude=["*mlp*"]).tensors.keys()
    )
    assert "lm_head.weight" in ns.diff(*sides, include="lm_head.weight").tensors


def test_a_budget_of_a_million_neurons_takes_what_sorting_all_would(tmp_path: Path) -> None:
    """Scores that are read again for each pass, not held: half of them equal, some not a number."""
    rng = np.random.default_rng(7)
    score = rng.choice(np.array([0.25, -0.0, 3e-41, np.inf], np.float32), 1_100_000)
    score[::2] = rng.standard_normal(550_000).astype(np.float32)
    score[::1001] = np.nan
    parts = {"a": score[:300_000], "b": score[300_000:]}
    content: Content = {
        "version": 2,
        "descriptions": [described([len(part), 4]) for part in parts.values()],
        "tensors": {"a": 0, "b": 1},
    }
    scores = Scores.load(write(tmp_path / "s", content, {"score": score}))
    for policy, key in (("sensitive", -score), ("reversed", score)):
        order = np.argsort(key, kind="stable")
        for count in (1, 400_000, 2_000_000):
            wanted = np.sort(order[: min(count, np.count_nonzero(score == score))])
            chosen = scores.select(neurons=count, policy=policy).tensors
            found = [chosen[name].index + 300_000 * (name == "b") for name in chosen]
            assert np.array_equal(np.concatenate(found), wanted)
    above = scores.select(threshold=0.25).tensors
    assert sum(len(one.index) for one in above.values()) == np.count_nonzero(score > 0.25)
