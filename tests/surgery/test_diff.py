"""diff over files: what is scored and what is only listed, whole units, and the file it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file
from support import LLAMA_CONFIG, llama, process, raw_file, vectors_of, write_file, write_folder
from test_accuracy import LARGEST, SCORES, assert_close, reference

import neftsurgery as ns
from neftsurgery.scoring.sums import random_scores

Tensors = dict[str, NDArray[np.float32]]


def tuned_from(base: Tensors, change: float = 1e-3, seed: int = 1) -> Tensors:
    """Every tensor moved a little, each third row along itself, and each fifth not at all."""
    rng = np.random.default_rng(seed)
    tuned = {}
    for name, a in base.items():
        b = a + change * rng.standard_normal(a.shape).astype(np.float32) * np.abs(a).mean()
        b[::3] = a[::3] * np.float32(1 + change)
        b[::5] = a[::5]
        tuned[name] = b.astype(np.float32)
    return tuned


@pytest.fixture
def llamas(llama_arrays, tmp_path) -> tuple[Tensors, Tensors, Path, Path]:
    base = llama_arrays()
    tuned = tuned_from(base)
    folders = [
        write_folder(tmp_path / name, tensors, config=LLAMA_CONFIG)
        for name, tensors in (("base", base), ("tuned", tuned))
    ]
    return base, tuned, *folders


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


# Rows: the values, and the file.


@pytest.mark.parametrize("kind", SCORES)
def test_rows(llamas, kind):
    base, tuned, *folders = llamas
    scores = ns.diff(*folders, score=kind)
    assert list(scores.tensors) == sorted(name for name in base if linear(name))
    for name, tensor in scores.tensors.items():
        assert tensor.layout.axes == (0,)
        assert_close(scores.values(name), reference(kind, base[name], tuned[name]), f"{name} {kind}")


def test_the_file_is_as_the_contract_says(llamas, tmp_path):
    base, tuned, *folders = llamas
    path = tmp_path / "scores.safetensors"
    scores = ns.diff(*folders, out=path)
    entries = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = json.loads(file.metadata()["neuron_scores"])
    assert metadata["version"] == 2
    assert metadata["score"] == "cosine"
    assert metadata["anatomy"] == "rows"
    assert metadata["parameters"] == sum(a.size for a in base.values())
    assert metadata["nonfinite"] == 0
    for side in ("base", "tuned"):
        assert metadata[side]["name"] == side
        assert metadata[side]["fingerprint"].startswith("xxh3-128:")
    assert metadata["base"]["fingerprint"] != metadata["tuned"]["fingerprint"]
    assert metadata.keys() >= {"tensors", "unscored"}
    assert sorted(metadata["tensors"]) == sorted(name for name in base if linear(name))
    assert sorted(metadata["unscored"]) == sorted(name for name in base if not linear(name))
    neurons = sum(base[name].shape[0] for name in metadata["tensors"])
    arrays = {"score": "f4", "base_sq": "f8", "delta_sq": "f8", "dot": "f8", "changed": "u4"}
    assert {name: (array.dtype, array.shape) for name, array in entries.items()} == {
        name: (np.dtype(kind), (neurons,)) for name, kind in arrays.items()
    }
    start = 0
    for name, number in sorted(metadata["tensors"].items()):
        entry = metadata["descriptions"][number]
        assert (entry["shape"], entry["dtype"], entry["neuron_axes"]) == (list(base[name].shape), "F32", [0])
        a, b = (side[name].astype(np.float64) for side in (base, tuned))
        sums = {
            "base_sq": a * a,
            "delta_sq": (b - a) ** 2,
            "dot": a * (b - a),
            "changed": base[name] != tuned[name],
        }
        for which, products in sums.items():
            found = entries[which][start : start + len(a)]
            size = math.sqrt(sums["base_sq"].sum() * sums["delta_sq"].sum())
            np.testing.assert_allclose(found, products.sum(1), rtol=1e-5, atol=1e-6 * size * (which == "dot"))
            np.testing.assert_array_equal(found, scores.sums(name, which))
        np.testing.assert_array_equal(entries["score"][start : start + len(a)], scores.values(name))
        start += len(a)
    for name, entry in metadata["unscored"].items():
        assert_unscored(entry, base[name], tuned[name])
    assert path.stat().st_mode == (folders[0] / "config.json").stat().st_mode  # as the umask has it


def assert_unscored(entry: dict[str, Any], base: NDArray[Any], tuned: NDArray[Any]) -> None:
    wide = np.complex128 if base.dtype.kind == "c" else np.float64
    d = tuned.astype(wide) - base.astype(wide)
    assert entry["delta_sq"] == pytest.approx(float((np.abs(d) ** 2).sum()), rel=1e-5, abs=0)
    assert entry["changed"] == int((base != tuned).sum())
    assert entry["shape"] == list(base.shape)
    assert entry["reason"]


def test_saved_loaded_and_selected_from_it_is_the_same(llamas, tmp_path):
    *_, base, tuned = llamas
    with ns.diff(base, tuned, out=tmp_path / "out.safetensors") as written, ns.diff(base, tuned) as kept:
        kept.save(tmp_path / "saved.safetensors")
        whole = (tmp_path / "out.safetensors").read_bytes()
        assert (tmp_path / "saved.safetensors").read_bytes() == whole
        loaded = ns.Scores.load(tmp_path / "saved.safetensors")
        for options in (
            {"neurons": "3%"},
            {"params": 700},
            {"changed": True},
            {"neurons": 5, "policy": "random"},
        ):
            choices = [one.select(**options) for one in (written, kept, loaded)]
            assert choices[0].neurons > 0
            for choice in choices[1:]:
                assert choice.facts == choices[0].facts
                assert index_of(choice) == index_of(choices[0])
        loaded.close()


def index_of(selection: ns.Selection) -> dict[str, list[int]]:
    return {name: chosen.index.tolist() for name, chosen in selection.tensors.items()}


def test_threads_memory_and_shards_do_not_count(llamas, tmp_path):
    """Nor does which of the two is sharded, and how: the file has the same bytes but for the names."""
    base, tuned, *folders = llamas
    alone = ns.diff(*folders, out=tmp_path / "1.safetensors", threads=1)
    ns.diff(*folders, out=tmp_path / "4.safetensors", threads=4)
    ns.diff(*folders, out=tmp_path / "small.safetensors", threads=2, memory=16 << 20)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
    sharded = [
        write_folder(tmp_path / f"{name}-sharded", tensors, shards, LLAMA_CONFIG)
        for name, tensors, shards in (("base", base, 3), ("tuned", tuned, 5))
    ]
    for pair in ((folders[0], sharded[1]), (sharded[0], folders[1]), tuple(sharded)):
        found = ns.diff(*pair)
        assert found.facts["base"]["fingerprint"] == alone.facts["base"]["fingerprint"]
        assert found.facts["unscored"] == alone.facts["unscored"]
        for name in alone.tensors:
            assert found.values(name).tobytes() == alone.values(name).tobytes()


def test_a_folder_and_its_file_score_alike(llamas):
    *_, base, tuned = llamas
    by_file = ns.diff(base / "model.safetensors", tuned, only=["*_proj.weight"])
    by_folder = ns.diff(base, tuned)
    for name in by_folder.tensors:
        np.testing.assert_array_equal(by_file.values(name), by_folder.values(name))


@pytest.mark.parametrize("kind", ["cosine", "changed", "random"])
def test_thousands_of_tensors_in_another_order_than_their_names(tmp_path, kind):
    """Their numbers are written in batches. One of them alone is larger than a batch."""
    rng = np.random.default_rng(0)
    shapes = {f"layers.{n % 7}.experts.{n}.weight": (1 + 97 * n % 113, 3 + n % 5) for n in range(2000)}
    shapes["layers.3.router.weight"] = (70_000, 2)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {name: np.where(rng.random(a.shape) < 0.5, a, a + np.float32(0.1)) for name, a in base.items()}
    folders = [write_folder(tmp_path / name, side, 3) for name, side in (("a", base), ("b", tuned))]
    scores = ns.diff(*folders, include=["*"], score=kind, out=tmp_path / "scores")
    assert list(scores.tensors) == sorted(shapes)
    names = list(scores.tensors)
    a, b = (np.concatenate([np.pad(side[n], ((0, 0), (0, 7 - side[n].shape[1]))) for n in names])
            for side in (base, tuned))  # fmt: skip
    widths = np.concatenate([np.full(*base[n].shape) for n in names])
    arrays = load_file(tmp_path / "scores")
    np.testing.assert_array_equal(arrays["changed"], (a != b).sum(1))
    wide = a.astype(np.float64), (b - a).astype(np.float64)
    np.testing.assert_allclose(arrays["base_sq"], (wide[0] ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(arrays["delta_sq"], (wide[1] ** 2).sum(1), rtol=1e-5)
    if kind == "random":
        assert len(set(arrays["score"].tolist())) > len(a) * 0.98
        np.testing.assert_array_equal(
            scores.values(names[5]), random_scores(names[5], shapes[names[5]][0], 0)
        )
    else:
        expected = (a != b).sum(1) / widths if kind == "changed" else reference(kind, a, b)
        assert_close(arrays["score"], expected, kind)
    picked = names[1234]
    found = ns.diff(*folders, include=[picked], only=[picked], score=kind)
    for which in ("base_sq", "delta_sq", "dot", "changed"):
        np.testing.assert_array_equal(scores.sums(picked, which), found.sums(picked, which), strict=True)
    np.testing.assert_array_equal(scores.values(picked), found.values(picked), strict=True)


def test_the_output(llamas, tmp_path):
    *_, base, tuned = llamas
    out = tmp_path / "scores.safetensors"
    out.write_text("precious")
    with pytest.raises(ns.UsageError, match="exists"):
        ns.diff(base, tuned, out=out)
    assert out.read_text() == "precious"
    ns.diff(base, tuned, out=out, force=True)
    assert ns.Scores.load(out).neurons > 0
    before = (tuned / "model.safetensors").read_bytes()
    for inside in (tuned / "model.safetensors", tuned / "scores.safetensors"):
        with pytest.raises(ns.UsageError):
            ns.diff(base, tuned, out=inside, force=True)
    assert (tuned / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "scores.safetensors", "tuned"]


def test_options_that_make_no_sense(llamas):
    *_, base, tuned = llamas
    with pytest.raises(ns.UsageError, match="there is no score 'cosinus'"):
        ns.diff(base, tuned, score="cosinus")
    with pytest.raises(ns.UsageError, match="there is no anatomy 'row'"):
        ns.diff(base, tuned, anatomy="row")
    with pytest.raises(ns.UsageError, match="negative"):
        ns.diff(base, tuned, score="random", seed=-1)
    with pytest.raises(ns.UsageError):
        ns.diff(base / "absent", tuned)


def test_progress_is_told_of_all_bytes(llamas):
    base, _, *folders = llamas
    told: list[int] = []

    class Bar:
        def __init__(self, what: str, total: int) -> None:
            assert total == 2 * sum(a.nbytes for a in base.values())
            self.total = total

        def __enter__(self):
            return told.append

        def __exit__(self, *error: object) -> None:
            assert sum(told) == self.total

    ns.diff(*folders, progress=Bar)
    assert told


def test_random(llamas):
    *_, base, tuned = llamas
    one, again, other = (ns.diff(base, tuned, score="random", seed=seed) for seed in (1, 1, 2))
    assert one.facts["seed"] == 1
    for name in one.tensors:
        values = one.values(name)
        assert ((values >= 0) & (values < 1)).all()
        assert len(np.unique(values)) == len(values)
        np.testing.assert_array_equal(values, again.values(name))
        assert (values != other.values(name)).any()
    changes = (scores.select(neurons="10%").facts["captured"] for scores in (one, other))
    assert max(changes) < ns.diff(base, tuned, score="l2").select(neurons="10%").facts["captured"]


# What is not scored.


def test_captured(llamas):
    base, tuned, *folders = llamas
    scores = ns.diff(*folders, score="l2")
    delta = {name: ((tuned[name].astype(np.float64) - base[name]) ** 2) for name in base}
    whole = sum(d.sum() for d in delta.values())
    scored = sum(d.sum() for name, d in delta.items() if linear(name))
    for options in ({"neurons": "3%"}, {"neurons": 17, "per": "tensor"}, {"changed": True}):
        selection = scores.select(**options)
        inside = sum(delta[name][chosen.index].sum() for name, chosen in selection.tensors.items())
        assert selection.facts["captured"] == pytest.approx(inside / whole, rel=1e-5)
        assert selection.facts["captured_scored"] == pytest.approx(inside / scored, rel=1e-5)
        assert 0 < inside < whole
    assert scores.select(changed=True).facts["captured_scored"] == 1


def test_nothing_changed(llamas):
    *_, base, _ = llamas
    scores = ns.diff(base, base)
    assert all((scores.values(name) == 0).all() for name in scores.tensors)
    selection = scores.select(neurons=3)
    assert selection.neurons == 3
    assert not {"captured", "captured_scored"} & selection.facts.keys()
    assert scores.select(changed=True).neurons == 0


ODD = {
    "bool": ("BOOL", "?"),
    "u8": ("U8", "u1"),
    "i8": ("I8", "i1"),
    "i16": ("I16", "i2"),
    "u16": ("U16", "u2"),
    "i32": ("I32", "i4"),
    "u32": ("U32", "u4"),
    "i64": ("I64", "i8"),
    "u64": ("U64", "u8"),
    "c64": ("C64", "c8"),
}


def test_tensors_of_every_type_are_listed_and_counted(tmp_path):
    rng = np.random.default_rng(0)
    sides: tuple[list[Any], list[Any]] = ([], [])
    arrays: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for name, (kind, code) in ODD.items():
        a, b = (rng.integers(0, 2 if code == "?" else 100, (6, 5)).astype(code) for _ in "ab")
        arrays[name] = (a, b)
        for side, array in zip(sides, (a, b), strict=True):
            side.append((name, kind, [6, 5], array.tobytes()))
    packed = {"f4": ("F4", 4), "f6a": ("F6_E2M3", 6), "f6b": ("F6_E3M2", 6), "e8": ("F8_E8M0", 8)}
    for name, (kind, bits) in packed.items():
        a = bytes(rng.integers(0, 256, 8 * 5 * bits // 8, np.uint8))
        for side, data in zip(sides, (a, bytes([a[0] ^ 1]) + a[1:-1] + bytes([a[-1] ^ 128])), strict=True):
            side.append((name, kind, [8, 5], data))
    one = np.array([1.5], np.float32)
    for side, factor in zip(sides, (1, 3), strict=True):
        side += [
            ("empty", "F32", [0, 7], b""),
            ("empty1", "BF16", [7, 0], b""),
            ("scalar", "F32", [], (one * factor).tobytes()),
            ("single", "F32", [1, 1], (one * factor).tobytes()),
            ("narrow", "F32", [4, 1], np.tile(one * factor, 4).tobytes()),
            ("vector", "F32", [4], np.tile(one * factor, 4).tobytes()),
            ("weight", "F32", [4, 3], (np.arange(12, dtype=np.float32) ** factor).tobytes()),
        ]
    files = [raw_file(tmp_path / f"{name}.safetensors", side) for name, side in zip("ab", sides, strict=True)]
    scores = ns.diff(*files)
    assert list(scores.tensors) == ["weight"]
    unscored = scores.facts["unscored"]
    assert sorted(unscored) == sorted({name for name, *_ in sides[0]} - {"weight"})
    for name, (a, b) in arrays.items():
        assert_unscored(unscored[name], a, b)
    for name in packed:
        assert (unscored[name]["changed"], unscored[name]["delta_sq"]) == (2, None)
    for name in ("empty", "empty1"):
        assert (unscored[name]["changed"], unscored[name]["delta_sq"]) == (0, 0)
    for name, count in (("scalar", 1), ("single", 1), ("narrow", 4), ("vector", 4)):
        assert (unscored[name]["changed"], unscored[name]["delta_sq"]) == (count, 9 * count)
    selection = scores.select(neurons=1)
    delta = scores.sums("weight", "delta_sq")
    expected = delta[selection.tensors["weight"].index].sum() / delta.sum()
    assert selection.facts["captured_scored"] == pytest.approx(expected)
    assert "captured" not in selection.facts  # the packed ones changed, by nobody knows how much
    plain = [
        raw_file(tmp_path / f"plain{n}.safetensors", [t for t in side if t[0] not in packed])
        for n, side in enumerate(sides)
    ]
    selection = ns.diff(*plain).select(neurons=1)
    whole = sum(entry["delta_sq"] or 0 for entry in unscored.values()) + delta.sum()
    expected = delta[selection.tensors["weight"].index].sum() / whole
    assert selection.facts["captured"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F16", "F64"])
def test_float_types_are_scored(tmp_path, dtype):
    rng = np.random.default_rng(1)
    if dtype == "F64":
        a = rng.standard_normal((9, 20)).view(np.uint64)
    else:
        a = rng.integers(0x30, 0x40, (9, 20), np.uint8)  # all are numbers, none is far from 1
        a = a if dtype != "F16" else a.astype(np.uint16) << 8
    b = np.where(rng.random(a.shape) < 0.2, a ^ a.dtype.type(1 << (a.itemsize * 6 - 6)), a)
    b[4] = a[4]
    for name, side in (("a", a), ("b", b)):
        raw_file(tmp_path / f"{name}.safetensors", {"w": (dtype, side)})
    scores = ns.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    values = scores.values("w")
    assert values[4] == 0
    assert (np.delete(values, 4) > 0).all()
    np.testing.assert_array_equal(scores.sums("w", "changed"), (a != b).sum(1))


def test_codes_without_their_scales_are_counted_only(tmp_path):
    """The difference of two codes means nothing, and so captures nothing."""
    weight, scale = np.arange(0x30, 0x3C, dtype=np.uint8).reshape(3, 4), np.ones((1, 1), np.float32)
    for name, bits in (("a", weight), ("b", weight ^ 1)):
        plain = (np.arange(6, dtype=np.float32) + bits[0, 0]).reshape(3, 2)
        tensors = {"q.weight": ("F8_E4M3", bits), "q.weight_scale_inv": ("F32", scale.view(np.uint32))}
        raw_file(tmp_path / f"{name}.safetensors", {**tensors, "p.weight": ("F32", plain.view(np.uint32))})
    scores = ns.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert list(scores.tensors) == ["p.weight"]
    entry = scores.facts["unscored"]["q.weight"]
    assert entry["reason"].startswith("quantized")
    assert "q.weight_scale_inv" in entry["reason"]
    assert (entry["changed"], entry["delta_sq"]) == (12, None)
    facts = scores.select(neurons="100%").facts
    assert "captured" not in facts
    assert facts["captured_scored"] == 1


def test_tensors_on_one_side_or_of_another_kind(tmp_path):
    rng = np.random.default_rng(2)

    def weight(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    shared = weight(6, 5)
    base = {
        "both": shared,
        "gone": weight(3, 3),
        "grown": weight(4, 4),
        "cast": weight(4, 4),
        "turned": weight(2, 3),
    }
    tuned = {
        "both": 2 * shared,
        "new": weight(3, 3),
        "grown": weight(5, 4),
        "cast": weight(4, 4).astype(np.float16),
    }
    tuned["turned"] = weight(3, 2)
    files = [write_file(tmp_path / f"{n}.safetensors", t) for n, t in (("a", base), ("b", tuned))]
    scores = ns.diff(*files)
    assert list(scores.tensors) == ["both"]
    assert scores.facts["only_in_base"] == ["gone"]
    assert scores.facts["only_in_tuned"] == ["new"]
    assert scores.facts["differing"] == {
        "cast": {"base": "F32 [4, 4]", "tuned": "F16 [4, 4]"},
        "grown": {"base": "F32 [4, 4]", "tuned": "F32 [5, 4]"},
        "turned": {"base": "F32 [2, 3]", "tuned": "F32 [3, 2]"},
    }
    assert scores.facts["unscored"] == {}
    assert scores.select(neurons="100%").facts["captured"] == 1


def test_nothing_in_common(tmp_path):
    one = np.ones((3, 3), np.float32)
    a = write_file(tmp_path / "a.safetensors", {"left": one, "third": one})
    for number, tensors in enumerate(
        ({"right": one}, {"left": one.astype(np.float16)}, {"third": one[:2]}, {})
    ):
        b = write_file(tmp_path / f"b{number}.safetensors", tensors)
        with pytest.raises(ns.MismatchError, match="no tensor in common") as error:
            ns.diff(a, b)
        assert "a.safetensors" in error.value.what
        assert f"b{number}.safetensors" in error.value.what
        assert error.value.expected is not None
        assert error.value.found is not None
    with pytest.raises(ns.MismatchError, match="F32"):
        ns.diff(a, tmp_path / "b1.safetensors")


def test_nothing_that_can_be_scored(tmp_path):
    file = write_file(
        tmp_path / "a.safetensors", {"codes": np.ones((3, 3), np.int8), "one": np.ones(3, np.float32)}
    )
    with pytest.raises(ns.MismatchError, match="can be scored") as error:
        ns.diff(file, file)
    assert "codes" in str(error.value)


def test_a_damaged_file(llamas):
    *_, base, tuned = llamas
    whole = (tuned / "model.safetensors").read_bytes()
    (tuned / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ns.CorruptFileError):
        ns.diff(base, tuned)


def test_unscored_numbers_far_from_one(tmp_path):
    """Sums that float32 would lose, and those that not even JSON could hold."""
    rng = np.random.default_rng(3)
    a = {"w": np.ones((2, 2), np.float32), "tiny": (1e-24 * rng.standard_normal(50)).astype(np.float32)}
    a |= {
        "large": (3e19 * rng.standard_normal(50)).astype(np.float32),
        "huge": rng.standard_normal(9) * 1e200,
    }
    b = {name: -array for name, array in a.items()}
    files = [write_file(tmp_path / f"{n}.safetensors", t) for n, t in (("a", a), ("b", b))]
    unscored = ns.diff(*files).facts["unscored"]
    for name in ("tiny", "large"):
        assert_unscored(unscored[name], a[name], b[name])
    assert unscored["huge"]["delta_sq"] == float(np.finfo(np.float64).max)
    assert unscored["huge"]["changed"] == 9


def test_axes_of_the_users(tmp_path):
    rng = np.random.default_rng(4)
    a = {"dense.kernel": rng.standard_normal((7, 9)), "conv": rng.standard_normal((4, 3, 5)), "w": np.eye(4)}
    a = {name: array.astype(np.float32) for name, array in a.items()}
    b = tuned_from(a, 1e-2)
    files = [write_file(tmp_path / f"{n}.safetensors", t) for n, t in (("a", a), ("b", b))]
    axis = {"*": 0, "*kernel": 1, "conv": (1, 2)}
    scores = ns.diff(*files, axis=axis)
    for name, axes in (("dense.kernel", (1,)), ("conv", (1, 2)), ("w", (0,))):
        assert scores.tensors[name].layout.axes == axes
        assert scores.facts["tensors"][name]["neuron_axes"] == list(axes)
        pair = (vectors_of(side[name], axes) for side in (a, b))
        assert_close(scores.values(name), reference("cosine", *pair), name)


# Numbers that are none.


def test_neurons_that_are_not_finite(llamas, tmp_path):
    """Counted, never chosen by score, taken by --changed where their bits differ."""
    base, tuned, *folders = llamas
    name = "model.layers.0.mlp.up_proj.weight"
    base[name][3, 1] = tuned[name][3, 1] = np.nan  # unchanged, but for the other elements
    tuned[name][3] = base[name][3]
    base[name][4, 0] = np.inf
    tuned[name][7, 31] = -np.inf
    tuned[name][8, 2] = np.nan
    embedding = "model.embed_tokens.weight"
    tuned[embedding][5, 5] = np.nan
    for folder, tensors in zip(folders, (base, tuned), strict=True):
        write_file(folder / "model.safetensors", tensors)
    bad = [3, 4, 7, 8]
    for kind in (*SCORES, "random"):
        scores = ns.diff(*folders, score=kind)
        assert scores.facts["nonfinite"] == 4
        assert np.flatnonzero(np.isnan(scores.values(name))).tolist() == bad
        everything = scores.select(neurons="100%")
        assert everything.neurons == scores.neurons - 4
        assert not set(everything.tensors[name].index) & set(bad)
        assert 0 < everything.facts["captured"] <= 1
    changed = scores.select(changed=True).tensors[name].index
    differing = (base[name].view(np.uint32) != tuned[name].view(np.uint32)).any(1)
    np.testing.assert_array_equal(changed, np.flatnonzero(differing))
    assert {4, 7, 8} <= set(changed.tolist())
    assert 3 not in changed
    entry = scores.facts["unscored"][embedding]
    d = tuned[embedding].astype(np.float64) - base[embedding]
    assert entry["delta_sq"] == pytest.approx(np.nansum(d * d), rel=1e-5)
    assert entry["changed"] == (d != 0).sum()


# Biases and what the user adds.


@pytest.fixture
def biased(tmp_path) -> tuple[Tensors, Tensors, Path, Path]:
    """Two GPT-NeoX-like layers of linear weights with biases, of no known model."""
    rng = np.random.default_rng(5)
    base = {}
    for layer in range(2):
        base[f"h.{layer}.fc.weight"] = rng.standard_normal((8, 6)).astype(np.float32)
        base[f"h.{layer}.fc.bias"] = rng.standard_normal(8).astype(np.float32)
        base[f"h.{layer}.ln.weight"] = np.ones(6, np.float32)
    tuned = {name: array.copy() for name, array in base.items()}
    tuned["h.0.fc.weight"][[1, 5]] += np.float32(0.5)
    tuned["h.1.fc.weight"][2] *= np.float32(1.5)
    tuned["h.0.fc.bias"][[1, 3]] += np.float32(0.25)
    tuned["h.1.ln.weight"][4] = 2
    files = [write_file(tmp_path / f"{n}.safetensors", t) for n, t in (("a", base), ("b", tuned))]
    return base, tuned, *files


def test_biases_follow(biased):
    base, tuned, *files = biased
    scores = ns.diff(*files)
    assert sorted(scores.companion_biases) == ["h.0.fc.bias", "h.1.fc.bias"]
    delta = (tuned["h.0.fc.bias"].astype(np.float64) - base["h.0.fc.bias"]) ** 2
    np.testing.assert_allclose(scores.sums("h.0.fc.bias", "delta_sq"), delta)
    np.testing.assert_array_equal(scores.sums("h.0.fc.bias", "changed"), delta > 0)
    weights = {"h.0.fc.weight": [1, 5], "h.1.fc.weight": [2]}
    assert index_of(scores.select(changed=True)) == weights
    assert index_of(scores.select(changed=True, with_bias=True)) == {
        **weights,
        "h.0.fc.bias": [1, 3, 5],
        "h.1.fc.bias": [2],
    }
    by_score = scores.select(neurons=2, with_bias=True)
    assert index_of(by_score) == {"h.0.fc.weight": [1, 5], "h.0.fc.bias": [1, 5]}
    assert by_score.neurons == 2
    assert by_score.parameters == 2 * 6 + 2
    whole = sum(((tuned[n].astype(np.float64) - base[n]) ** 2).sum() for n in base)
    inside = ((tuned["h.0.fc.weight"][[1, 5]].astype(np.float64) - base["h.0.fc.weight"][[1, 5]]) ** 2).sum()
    assert by_score.facts["captured"] == pytest.approx((inside + delta[[1, 5]].sum()) / whole)
    assert scores.select(neurons=2).facts["captured"] == pytest.approx(inside / whole)
    control = scores.select(like=by_score, policy="random", seed=1, with_bias=True)
    assert control.counts == {"h.0.fc.weight": 2}
    assert index_of(control)["h.0.fc.bias"] == index_of(control)["h.0.fc.weight"]


def test_included_tensors_of_single_elements(biased):
    """They have no score, but --changed takes what differs, and so makes the patch lossless."""
    *_, first, second = biased
    scores = ns.diff(first, second, include=["*.ln.weight", "*.bias"])
    assert index_of(scores.select(changed=True)) == {
        "h.0.fc.weight": [1, 5],
        "h.1.fc.weight": [2],
        "h.0.fc.bias": [1, 3],
        "h.1.ln.weight": [4],
    }
    assert scores.select(changed=True).facts["captured"] == pytest.approx(1)
    assert set(scores.select(neurons="100%").tensors) == {"h.0.fc.weight", "h.1.fc.weight"}


# Feed-forward blocks and units.


def test_ffn(llamas):
    base, tuned, *folders = llamas
    scores = ns.diff(*folders, anatomy="ffn", score="cosine")
    axes = {
        f"model.layers.{n}.mlp.{what}_proj.weight": a for n in (0, 1) for what, a in (("up", 0), ("down", 1))
    }
    assert {name: tensor.layout.axes for name, tensor in scores.tensors.items()} == {
        n: (a,) for n, a in axes.items()
    }
    for name, axis in axes.items():
        pair = (vectors_of(side[name], (axis,)) for side in (base, tuned))
        assert_close(scores.values(name), reference("cosine", *pair), name)
    delta = {name: ((tuned[name].astype(np.float64) - base[name]) ** 2) for name in base}
    selection = scores.select(neurons="5%")
    inside = sum(np.take(delta[n], c.index, axes[n]).sum() for n, c in selection.tensors.items())
    assert selection.facts["captured"] == pytest.approx(
        inside / sum(d.sum() for d in delta.values()), rel=1e-5
    )


def test_ffn_of_fused_projections(tmp_path):
    """Phi-3 keeps gate and up in one tensor: only the up half counts, NaN or not."""
    rng = np.random.default_rng(6)
    gate_up, down = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    base = {gate_up: rng.standard_normal((20, 8)), down: rng.standard_normal((8, 10))}
    base = {name: array.astype(np.float32) for name, array in base.items()}
    tuned = {
        name: (array * rng.uniform(1, 1.1, array.shape)).astype(np.float32) for name, array in base.items()
    }
    tuned[gate_up][[2, 12], 3] = np.nan
    config: dict[str, object] = {"model_type": "phi3", "num_attention_heads": 2, "num_key_value_heads": 2}
    folders = [write_folder(tmp_path / n, t, config=config) for n, t in (("a", base), ("b", tuned))]
    scores = ns.diff(*folders, anatomy="ffn")
    values = scores.values(gate_up)
    assert np.flatnonzero(~np.isnan(values)).tolist() == [10, 11, *range(13, 20)]
    up = [row for row in range(10, 20) if row != 12]
    assert_close(values[up], reference("cosine", base[gate_up][up], tuned[gate_up][up]), "up")
    assert scores.facts["nonfinite"] == 1
    assert scores.neurons == 20
    assert index_of(scores.select(changed=True)) == {gate_up: list(range(10, 20)), down: list(range(10))}


def members(layer: int) -> Iterator[tuple[str, int, int, int]]:
    """What a layer of the little Llama is made of: tensor, axis, neurons, and how many make a unit."""
    for name, axis, count in (("up", 0, 48), ("gate", 0, 48), ("down", 1, 48)):
        yield f"model.layers.{layer}.mlp.{name}_proj.weight", axis, count, 1
    for name, axis, count, group in (("q", 0, 32, 16), ("k", 0, 16, 8), ("v", 0, 16, 8), ("o", 1, 32, 16)):
        yield f"model.layers.{layer}.self_attn.{name}_proj.weight", axis, count, group


def units_of(tensors: Tensors) -> dict[tuple[int, str, int], list[tuple[str, int, NDArray[np.float32]]]]:
    """The members of every unit, by layer, block and number, as (tensor, neuron, vector)."""
    units: dict[tuple[int, str, int], list[tuple[str, int, NDArray[np.float32]]]] = {}
    for layer in (0, 1):
        for name, axis, count, group in members(layer):
            vectors = vectors_of(tensors[name], (axis,))
            assert len(vectors) == count
            for neuron in range(count):
                units.setdefault((layer, name.split(".")[3], neuron // group), []).append(
                    (name, neuron, vectors[neuron])
                )
    return units


def concatenated(parts: list[tuple[str, int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    return np.concatenate([vector for *_, vector in parts])[None]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("change", [1e-1, 1e-4])
def test_units_are_scored_as_concatenated_vectors(llama_arrays, tmp_path, kind, change):
    base = llama_arrays()
    tuned = tuned_from(base, change)
    for name in base:
        if ".layers.1." in name:  # all of it scaled: every unit moves along itself, but for rounding
            tuned[name] = base[name] * np.float32(1 - change)
    name = "model.layers.0.mlp.up_proj.weight"
    base[name][5] = tuned[name][5] = 0
    tuned["model.layers.0.mlp.down_proj.weight"][:, 6] *= -1
    folders = [write_folder(tmp_path / n, t, 2, LLAMA_CONFIG) for n, t in (("a", base), ("b", tuned))]
    scores = ns.diff(*folders, anatomy="units", score=kind)
    first, second = units_of(base), units_of(tuned)
    assert len(first) == 2 * (48 + 2) == scores.units
    for unit, parts in first.items():
        expected = reference(kind, *(concatenated(some) for some in (parts, second[unit])))
        for tensor, neuron, _ in parts:
            assert_close(scores.values(tensor)[neuron : neuron + 1], expected, f"{unit} {kind}")


def test_unit_ids(llamas, tmp_path):
    """Numbered model-wide by first member, in the order of names and indices; in the file as one array."""
    base, _, *folders = llamas
    scores = ns.diff(*folders, anatomy="units", out=tmp_path / "s.safetensors")
    home = {(name, neuron): unit for unit, parts in units_of(base).items() for name, neuron, _ in parts}
    numbers: dict[tuple[int, str, int], int] = {}
    for member in sorted(home):
        numbers.setdefault(home[member], len(numbers))
    found = load_file(tmp_path / "s.safetensors")["unit"]
    assert found.dtype == np.int64
    assert found.tolist() == [numbers[home[member]] for member in sorted(home)]
    for name in scores.tensors:
        ids = scores.sums(name, "unit")
        assert ids.dtype == np.int64
        assert ids.tolist() == [numbers[home[name, neuron]] for neuron in range(len(ids))]
    assert set(scores.tensors) == {name for name, _ in home}


def test_whole_units_are_chosen(llamas):
    base, tuned, *folders = llamas
    scores = ns.diff(*folders, anatomy="units")
    units = units_of(base)
    second = units_of(tuned)
    truth = {
        unit: float(reference("cosine", concatenated(parts), concatenated(second[unit]))[0])
        for unit, parts in units.items()
    }
    for count in (1, 7, 30):
        best = sorted(units, key=lambda unit: -truth[unit])[:count]
        expected: dict[str, list[int]] = {}
        for unit in best:
            for name, neuron, _ in units[unit]:
                expected.setdefault(name, []).append(neuron)
        assert index_of(scores.select(neurons=count)) == {n: sorted(i) for n, i in sorted(expected.items())}
    per_layer = scores.select(neurons=6, per="layer")
    assert {name.split(".")[2] for name in per_layer.tensors} == {"0", "1"}


def test_a_unit_with_an_element_that_is_not_finite(llamas):
    _, tuned, *folders = llamas
    tuned["model.layers.1.mlp.gate_proj.weight"][9, 0] = np.nan
    write_file(folders[1] / "model.safetensors", tuned)
    for kind in ("cosine", "l2", "random"):
        scores = ns.diff(*folders, anatomy="units", score=kind)
        missing = {n: np.flatnonzero(np.isnan(scores.values(n))).tolist() for n in scores.tensors}
        hit = {f"model.layers.1.mlp.{which}_proj.weight": [9] for which in ("up", "gate", "down")}
        assert {name: where for name, where in missing.items() if where} == hit
        assert scores.facts["nonfinite"] == 1
        assert scores.select(neurons="100%").tensors["model.layers.1.mlp.up_proj.weight"].index.tolist() == [
            *range(9),
            *range(10, 48),
        ]
    taken = scores.select(changed=True).tensors["model.layers.1.mlp.gate_proj.weight"].index
    assert 9 in taken


def test_random_scores_of_units(llamas):
    base, _, *folders = llamas
    scores = ns.diff(*folders, anatomy="units", score="random", seed=3)
    values = {
        unit: {float(scores.values(n)[i]) for n, i, _ in parts} for unit, parts in units_of(base).items()
    }
    assert all(len(found) == 1 for found in values.values())
    drawn = [next(iter(found)) for found in values.values()]
    assert len(set(drawn)) == len(drawn)
    assert 0 <= min(drawn) < max(drawn) < 1
    again = ns.diff(*folders, anatomy="units", score="random", seed=3)
    other = ns.diff(*folders, anatomy="units", score="random", seed=4)
    for name in scores.tensors:
        np.testing.assert_array_equal(again.values(name), scores.values(name))
        assert (other.values(name) != scores.values(name)).any()


def test_units_need_a_known_model(tmp_path):
    file = write_file(tmp_path / "a.safetensors", {"w": np.ones((3, 3), np.float32)})
    for anatomy in ("units", "ffn"):
        with pytest.raises(ns.MismatchError, match=f"anatomy {anatomy} needs"):
            ns.diff(file, file, anatomy=anatomy)


def test_zero_rows(tmp_path):
    """The contract's last column: what the scores of a base of 0 are."""
    a = np.array([[0, 0], [0, 0], [3, 4], [3, 4]], np.float32)
    b = np.array([[0, 0], [3, 4], [0, 0], [3, 4]], np.float32)
    files = [write_file(tmp_path / f"{n}.safetensors", {"w": side}) for n, side in (("a", a), ("b", b))]
    expected = {
        "cosine": [0, 1, 1, 0],
        "l2": [0, 5, 5, 0],
        "relative": [0, LARGEST, 1, 0],
        "changed": [0, 1, 1, 0],
        "norm": [LARGEST, LARGEST, 0.2, 0.2],
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(ns.diff(*files, score=kind).values("w"), np.float32(values), rtol=1e-6)


@pytest.mark.parametrize("anatomy", ["rows", "units"])
def test_scores_without_sums(anatomy: str, tmp_path: Path) -> None:
    base, rng = llama(32, 64, 2, 50, 0), np.random.default_rng(1)
    tuned = {k: (v.T * (1 + rng.random(len(v), np.float32) ** 8)).T for k, v in base.items()}
    for name, side in (("base", base), ("tuned", tuned)):
        write_folder(tmp_path / name, side, config={"model_type": "llama", "num_attention_heads": 4})
    how = {"anatomy": anatomy, "out": tmp_path / "without"}
    sides = tmp_path / "base", tmp_path / "tuned"
    full, bare = ns.diff(*sides, anatomy=anatomy), ns.diff(*sides, sums=False, **how)
    with safe_open(tmp_path / "without", "numpy") as file:
        assert {*file.keys()} == {"score", "unit"} if anatomy == "units" else {"score"}
    for name in full.tensors:
        np.testing.assert_array_equal(bare.values(name), full.values(name))
        assert bare.sums(name, "delta_sq") is None
    chosen, wanted = bare.select(neurons="10%"), full.select(neurons="10%")
    assert {name: c.index.tolist() for name, c in chosen.tensors.items()} == {
        name: c.index.tolist() for name, c in wanted.tensors.items()
    }
    assert wanted.facts.captured is not None
    assert chosen.facts.captured is None
    with pytest.raises(ns.UsageError, match="needs the number of changed elements"):
        bare.select(changed=True)
    patch = ns.extract(*sides, scores=bare, neurons="10%")
    assert patch.neurons == wanted.neurons
    command = ("diff", str(sides[0]), str(sides[1]), "--no-sums", "--anatomy", anatomy)
    told = process(*command, cwd=tmp_path)
    assert "Without sums, only the order of the neurons is known." in told.out
    assert "identical" not in told.out
    assert process(*command, "--json", cwd=tmp_path).json["related"] is None
