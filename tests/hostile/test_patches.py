"""Files that are damaged, hostile or not patches: refused with a message, and nothing is written.

The neuron patches are of version 1, which nothing writes any more and everything reads; those of version 2
are in `test_version_2.py`.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_support import EDITS, Edit, edited, frugal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support import as_version_1, assert_same_tensors, raw_file, raw_folder, raw_read, snapshot

import neftsurgery as ns

Entries = dict[str, tuple[str, np.ndarray]]
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

BASE = {
    "a.weight": ("BF16", np.arange(100, 124, dtype="u2").reshape(6, 4)),
    "b.weight": ("F32", np.arange(1000, 1035, dtype="u4").reshape(5, 7)),
    "c.weight": ("F32", np.arange(2000, 2006, dtype="u4").reshape(2, 3)),
}
TUNED = {name: (kind, bits + bits.dtype.type(5000)) for name, (kind, bits) in BASE.items()}


class Case:
    """A folder with a base and a valid reversible patch on rows of ``a`` and columns of ``b``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = raw_folder(root / "base", BASE, 2)
        tuned = raw_folder(root / "tuned", TUNED)
        options = {"axis": {"b.weight": 1}, "only": ["a.*", "b.*"], "score": "random"}
        self.good = root / "good"
        ns.extract(self.base, tuned, neurons="60%", reversible=True, out=self.good, **options).close()
        as_version_1(self.good)
        ns.apply(self.base, self.good, out=root / "patched")
        self.expected = raw_read(root / "patched")
        with safe_open(self.good, "numpy") as file:
            self.metadata: dict[str, str] = file.metadata()
        self.entries: Entries = {
            name: (kind, bits.copy()) for name, (kind, bits) in raw_read(self.good).items()
        }

    def manifest(self) -> dict[str, Any]:
        return json.loads(self.metadata["neuron_patch"])

    def write(self, entries: Entries | None = None, manifest: object = None, text: str | None = None) -> Path:
        """A patch file that differs from the valid one in entries, manifest, or the manifest's text."""
        if text is None:
            text = self.metadata["neuron_patch"] if manifest is None else json.dumps(manifest)
        path = self.root / "bad"
        return raw_file(path, self.entries if entries is None else entries, {"neuron_patch": text})

    def refused(self, patch: Path, error: type[ns.NeftError] = ns.CorruptFileError, says: str = ".") -> None:
        """Every verb refuses it, names the file, and changes no file or folder."""
        before = snapshot(self.root)
        patched, out = self.root / "patched", self.root / "out"
        for verb in (
            lambda: ns.apply(self.base, patch, out=out),
            lambda: ns.apply(self.base, [self.good, patch], out=out),
            lambda: ns.apply(self.base, patch, in_place=True),
            lambda: ns.verify(self.base, patch),
            lambda: ns.revert(patched, patch, out=out),
            lambda: ns.revert(patched, patch, in_place=True),
            lambda: ns.revert(patched, patch, base=self.base, out=out),
        ):
            with pytest.raises(error, match=says) as caught:
                verb()
            assert str(patch) in str(caught.value)
            assert len(str(caught.value)) < 2000
        assert snapshot(self.root) == before


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


PARTS = ("value", "base_digest", "base")


@pytest.mark.parametrize("position", [0, 0.5, 1])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_one_flipped_bit_of_the_content(case: Case, name: str, part: str, position: float) -> None:
    raw = case.entries[f"{name}:{part}"][1].reshape(-1).view("u1")
    raw[int(position * (len(raw) - 1))] ^= 1
    path = case.write()
    case.refused(path, says="do(es)? not match")
    with ns.Patch.load(path) as patch, pytest.raises(ns.CorruptFileError, match=r"not match|\n"):
        patch.check()


def test_a_merge_with_a_damaged_digest_names_the_damaged_patch(case: Case) -> None:
    """It looks like a patch of another base, but its own hashes tell."""
    case.entries["a.weight:base_digest"][1].reshape(-1).view("u1")[0] ^= 1
    path = case.write()
    for patches in ([case.good, path], [path, case.good]):
        with pytest.raises(ns.CorruptFileError, match=r"do(es)? not match") as caught:
            ns.merge(patches, on_overlap="mean", out=case.root / "out")
        assert (caught.value.file, caught.value.tensor) == (str(path), "a.weight")
    assert not (case.root / "out").exists()


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_one_flipped_bit_of_an_index(case: Case, name: str, position: int) -> None:
    """Hashes cover vectors, not indices: the comparison with the base finds a changed index at the latest."""
    index = case.entries[f"{name}:index"][1]
    raw = index.view("u1")
    raw[position] ^= 1
    path, before = case.write(), snapshot(case.root)
    for verb in (ns.apply, ns.revert):
        with pytest.raises((ns.CorruptFileError, ns.MismatchError)):
            verb(case.base if verb is ns.apply else case.root / "patched", path, out=case.root / "out")
    assert snapshot(case.root) == before | {"bad": snapshot(path)[""]}
    if position % 4:
        case.refused(path, says="range|ascending")


@pytest.mark.parametrize("key", ["base_hash", "patched_hash"])
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_a_wrong_hash_in_the_manifest(case: Case, name: str, key: str) -> None:
    manifest = case.manifest()
    text = manifest["tensors"][name][key]
    manifest["tensors"][name][key] = text[:-1] + ("0" if text[-1] != "0" else "1")
    case.refused(case.write(manifest=manifest), says=f"match(es)? {key}|not match {key}")


INDICES = {
    "out of range": [0, 6],
    "far out of range": [0, 2**31 - 1],
    "negative": [-1, 2],
    "all negative": [-2, -1],
    "unsorted": [3, 1],
    "a duplicate": [2, 2],
}


@pytest.mark.parametrize("kind", ["I32", "I64"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_that_makes_no_sense(case: Case, index: list[int], kind: str) -> None:
    count = len(case.entries["a.weight:index"][1])
    full = np.array([*index, *range(7, 7 + count - 2)] if count > 2 else index, np.int64)
    if index[0] != 0:
        full = np.array([*index, *range(max(index) + 1, max(index) + count - 1)], np.int64)
    bits = full.astype("<i4" if kind == "I32" else "<i8").view("u4" if kind == "I32" else "u8")
    path = case.write(case.entries | {"a.weight:index": (kind, bits)})
    case.refused(path, says="out of range|not ascending")


def test_an_index_at_the_end_of_the_integers(case: Case) -> None:
    count = len(case.entries["a.weight:index"][1])
    bits = np.array([*range(count - 1), 2**63 - 1], "<i8").view("u8")
    case.refused(case.write(case.entries | {"a.weight:index": ("I64", bits)}), says="out of range")


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a newer version": lambda m: m.update(version=2),
    "version 0": lambda m: m.update(version=0),
    "version true": lambda m: m.update(version=True),
    "version as text": lambda m: m.update(version="1"),
    "a version of 1.0": lambda m: m.update(version=1.0),
    "a huge version": lambda m: m.update(version=10**400),
    "no version": lambda m: m.pop("version"),
    "no tensors": lambda m: m.pop("tensors"),
    "a list of tensors": lambda m: m.update(tensors=list(m["tensors"])),
    "tensors null": lambda m: m.update(tensors=None),
    "a tensor too few": lambda m: m["tensors"].pop("a.weight"),
    "a tensor too many": lambda m: m["tensors"].update({"c.weight": m["tensors"]["a.weight"]}),
    "a tensor of another name": lambda m: m["tensors"].update(x=m["tensors"].pop("a.weight")),
    "a tensor that is a list": lambda m: m["tensors"].update({"a.weight": []}),
    "a tensor that is null": lambda m: m["tensors"].update({"a.weight": None}),
}
FIELDS: dict[str, tuple[str, list[object]]] = {
    "shape": (
        "shape",
        [None, "6,4", [6], [6, -4], [6, 4.0], [6, True], [6, "4"], [4, 6], [6, 4, 1, 2], [], {},
         [2**62, 2**62], [2**64, 1], [6, 2**31], [[6, 4]], [0, 4], [6, 0], 24, [6, None], [1] * 5000],
    ),
    "dtype": ("dtype", [None, "F99", "", "bf16", "F16", "F32", "F4", "U8", [], {}, ["BF16"], 16, True]),
    "axes": (
        "neuron_axes",
        [None, 0, "0", [], [1], [0, 1], [1, 0], [0, 0], [2], [-1], [0.0], [True], [None], [2**70], {"0": 0}],
    ),
    "base_hash": ("base_hash", [None, "", 5, [], "xxh3-128:", "md5:" + "0" * 32, "xxh3-128:" + "G" * 32]),
    "patched_hash": (
        "patched_hash",
        [None, "xxh3-128:" + "0" * 31, "xxh3-128:" + "0" * 33, "xxh3-128:" + "A" * 32, {}, "0" * 32 + "\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_makes_no_sense(case: Case, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = case.manifest()
    change(manifest)
    case.refused(case.write(manifest=manifest), says="patch")


def test_a_newer_version_says_both_versions_and_what_to_do(case: Case) -> None:
    path = case.write(manifest=case.manifest() | {"version": 3})
    case.refused(path, says=r"newer version \(expected 2 or older, found 3\)\n.*pip install -U")


def test_a_missing_field(case: Case) -> None:
    for field in ("shape", "dtype", "neuron_axes", "base_hash", "patched_hash"):
        manifest = case.manifest()
        del manifest["tensors"]["b.weight"][field]
        case.refused(case.write(manifest=manifest), says="b.weight")


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in FIELDS.values() for v in values], ids=str
)
def test_a_field_that_makes_no_sense(case: Case, field: str, value: object) -> None:
    manifest = case.manifest()
    assert json.dumps(manifest["tensors"]["a.weight"][field]) != json.dumps(value)
    manifest["tensors"]["a.weight"][field] = value
    case.refused(case.write(manifest=manifest), says="a.weight")


def test_a_shape_that_no_tensor_has(case: Case) -> None:
    manifest = case.manifest()
    manifest["tensors"]["a.weight"]["shape"] = [2**62, 4]
    case.refused(case.write(manifest=manifest), says="too many axes or elements")
    manifest["tensors"]["a.weight"]["shape"] = [2**40, 4]
    case.refused(case.write(manifest=manifest), ns.MismatchError, says=str(2**40))


def test_work_by_claim_is_refused(case: Case) -> None:
    """A few megabytes of manifest must not take seconds. They are refused by size; no time is measured."""
    manifest = case.manifest()
    manifest["tensors"]["a.weight"] |= {"shape": [1] * 20_000, "neuron_axes": list(range(20_000))}
    case.refused(case.write(manifest=manifest), says="too many axes or elements")


def test_indices_whose_differences_overflow(case: Case) -> None:
    """The order is compared, not subtracted: differences of extreme indices overflow."""
    from neftsurgery.neurons.vectors import check_index

    wild = np.array([0, 2**63 - 1, -(2**63) + 5, -1, 5])
    assert check_index(wild, 10) is not None


TEXTS = {
    "empty": "",
    "no JSON": "{",
    "null": "null",
    "a list": "[]",
    "a number": "1e999",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deeper": '{"tensors":' * 50_000,
    "long number": '{"version":' + "9" * 100_000 + "}",
    "binary": "\x00\x01",
    "half a surrogate": '{"version":1,"tensors":{"\\ud800":{}}}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_manifest_that_is_not_a_json_object(case: Case, text: str) -> None:
    case.refused(case.write(text=text))


@pytest.mark.parametrize("part", ["index", *PARTS])
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_a_missing_entry(case: Case, name: str, part: str) -> None:
    del case.entries[f"{name}:{part}"]
    path = case.write()
    if part != "base":
        case.refused(path, says=name)
        return
    # The replaced values of one tensor may be missing: the patch is then not reversible by itself.
    before = snapshot(case.root)
    with pytest.raises(ns.UsageError, match=r"with base=\.\.\."):
        ns.revert(case.root / "patched", path, out=case.root / "out")
    assert snapshot(case.root) == before
    ns.apply(case.base, path, out=case.root / "out")
    assert_same_tensors(raw_read(case.root / "out"), case.expected)


SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "a row too few": lambda bits: bits[:-1],
    "a row too many": lambda bits: np.concatenate([bits, bits[:1]]),
    "empty": lambda bits: bits[:0],
    "flat": lambda bits: bits.reshape(-1, 1, 1),
    "one axis more": lambda bits: bits[None],
    "another type": lambda bits: bits.view("i1"),
}


@pytest.mark.parametrize("part", ["index", *PARTS])
@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_an_entry_of_the_wrong_shape(
    case: Case, part: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    kind, bits = case.entries[f"a.weight:{part}"]
    wrong = np.ascontiguousarray(change(bits))
    case.entries[f"a.weight:{part}"] = ("I8" if wrong.dtype == np.int8 else kind), wrong
    case.refused(case.write(), says="a.weight")


@pytest.mark.parametrize(
    "name", ["junk", "c.weight:index", "a.weight:other", "a.weight", ":index", "a.weight:"]
)
def test_an_entry_too_many(case: Case, name: str) -> None:
    case.entries[name] = "U8", np.zeros(3, "u1")
    case.refused(case.write(), says="belongs to no tensor")


def test_facts_of_any_kind_do_no_harm(case: Case) -> None:
    """What a patch says of its origin is only shown, never relied on."""
    values: list[Any] = [None, 5, "x", [], {}, [5], {"followers": 5}, {"followers": [[], 3]}, {"name": []}]
    for key in ("base", "selection", "created_by", "unknown"):
        for value in [*values, {"followers": "a.weight"}, {"fingerprint": 7}, {"repo": {"a": 1}}]:
            path = case.write(manifest=case.manifest() | {key: value})
            with ns.Patch.load(path) as patch:
                assert patch.neurons == patch.selection.neurons > 0
                for name, facts in (("base", patch.base), ("selection", patch.facts)):
                    written = value if key == name else case.manifest()[name]
                    assert facts.to_json() == (written if isinstance(written, dict) else {})
                assert isinstance(patch.base.label, str | None)
                assert str(patch)
            ns.apply(case.base, path, out=case.root / "out", force=True)
            assert_same_tensors(raw_read(case.root / "out"), case.expected)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def pickled(case: Case) -> bytes:
    return pickle.dumps(Evil(case.root / "executed"))


def zipped(case: Case) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(case))
        archive.writestr("../../escaped", b"x")
    return buffer.getvalue()


FILES: dict[str, Callable[[Case], bytes]] = {
    "a pickle": pickled,
    "a zip with a pickle": zipped,
    "empty": lambda case: b"",
    "zeros": lambda case: bytes(1000),
    "text": lambda case: b"neuron_patch",
    "a checkpoint": lambda case: (case.root / "tuned" / "model.safetensors").read_bytes(),
    "JSON": lambda case: json.dumps(case.manifest()).encode(),
    "a header of 2**63 bytes": lambda case: struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 99 MB that is not there": lambda case: struct.pack("<Q", 99_000_000) + b"{}",
    "trailing bytes": lambda case: case.good.read_bytes() + b"\0",
    "a byte too few": lambda case: case.good.read_bytes()[:-1],
    "half": lambda case: case.good.read_bytes()[: case.good.stat().st_size // 2],
    "the header only": lambda case: case.good.read_bytes()[
        : 8 + struct.unpack("<Q", case.good.read_bytes()[:8])[0]
    ],
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_not_a_patch(case: Case, content: Callable[[Case], bytes]) -> None:
    path = case.root / "bad"
    path.write_bytes(content(case))
    case.refused(path)
    assert not (case.root / "executed").exists()


def test_a_path_that_does_not_exist(case: Case) -> None:
    for path in (case.root / "missing", case.root / "good" / "below", case.base):
        case.refused(path, ns.UsageError)


def test_real_malformed_files(shared_data: Path, case: Case) -> None:
    files = sorted((shared_data / "malformed").iterdir())
    assert files
    for path in files:
        case.refused(path)


NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "C:\\windows\\system32",
    "x" * 10_000,
    "ünï☃ \N{PILE OF POO} \u202e\u0000\n\t",
    "",
    "a:index",
    "a:index:value",
    "__metadata__:x",
    "{0} %s $HOME `id`",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_names_are_names_and_nothing_else(tmp_path: Path, name: str) -> None:
    bits = np.arange(12, dtype="u4").reshape(4, 3)
    base = raw_folder(tmp_path / "base", {name: ("F32", bits), "z": ("F32", bits + 50)})
    tuned = raw_folder(tmp_path / "tuned", {name: ("F32", bits + 99), "z": ("F32", bits)})
    ns.extract(base, tuned, changed=True, reversible=True, out=tmp_path / "p").close()
    ns.apply(base, tmp_path / "p", out=tmp_path / "out")
    assert_same_tensors(raw_read(tmp_path / "out"), raw_read(tuned))
    ns.apply(base, tmp_path / "p", in_place=True)
    ns.revert(base, tmp_path / "p", in_place=True)
    other = raw_folder(tmp_path / "other", {name: ("F32", bits + 1), "z": ("F32", bits)})
    with pytest.raises(ns.MismatchError) as caught:
        ns.apply(other, tmp_path / "p", out=tmp_path / "out2")
    assert len(str(caught.value)) < 2000
    without = raw_folder(tmp_path / "without", {"y": ("F32", bits)})
    with pytest.raises(ns.MismatchError, match="no such tensor") as caught:
        ns.apply(without, tmp_path / "p", out=tmp_path / "out2")
    assert len(str(caught.value)) < 2000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other", "out", "p", "tuned", "without"]


def test_a_patch_of_a_path_like_tensor_is_harmless(case: Case) -> None:
    """A name in a manifest is looked up among tensors, not in the file system."""
    target = case.root / "victim"
    target.write_bytes(b"untouched")
    for name in ("../victim", str(target)):
        manifest = case.manifest()
        manifest["tensors"] = {name: manifest["tensors"]["a.weight"]}
        entries = {k.replace("a.weight", name): v for k, v in case.entries.items() if k.startswith("a.")}
        case.refused(case.write(entries, manifest), ns.MismatchError, says="no such tensor")


def test_tensors_without_elements_and_patches_without_neurons(case: Case) -> None:
    """Legal but odd: there is nothing to do, and nothing crashes."""
    empty = "xxh3-128:99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing
    tensors = {"e": ("F32", np.zeros((0, 4), "u4")), "w": ("F32", np.zeros((3, 0), "u4"))} | BASE
    base = raw_folder(case.root / "empties", tensors)
    entry = {"dtype": "F32", "neuron_axes": [0], "base_hash": empty, "patched_hash": empty}
    shapes = {"e": [0, 4], "w": [3, 0], "b.weight": [5, 7]}
    manifest = case.manifest() | {"tensors": {name: entry | {"shape": s} for name, s in shapes.items()}}
    entries: Entries = {}
    for name, shape in shapes.items():
        entries[f"{name}:index"] = "I32", np.zeros(0, "u4")
        entries[f"{name}:value"] = entries[f"{name}:base"] = "F32", np.zeros((0, shape[1]), "u4")
        entries[f"{name}:base_digest"] = "U8", np.zeros((0, 16), "u1")
    path = case.write(entries, manifest)
    with ns.Patch.load(path) as patch:
        patch.check()
        assert patch.neurons == patch.parameters == 0
    before = snapshot(base)
    assert ns.verify(base, path).holds()
    ns.apply(base, path, out=case.root / "out")
    ns.apply(base, path, in_place=True)
    ns.apply(base, [path, path], in_place=True)
    ns.revert(base, path, in_place=True)
    assert snapshot(case.root / "out") == snapshot(base) == before


def survives(case: Case, path: Path) -> None:
    """Only errors of this package are raised; a file that is accepted is applied correctly."""
    before = snapshot(case.root)
    try:
        with frugal():
            with ns.Patch.load(path) as patch:
                assert patch.neurons >= 0
                assert patch.parameters >= 0
                assert patch.reversible in (True, False)
                assert patch.selection.counts is not None
                patch.check()
            ns.verify(case.base, path)
            ns.apply(case.base, path, out=case.root / "out")
    except ns.NeftError:
        assert snapshot(case.root) == before
    else:
        assert_same_tensors(raw_read(case.root / "out"), case.expected)


@pytest.fixture(scope="module")
def shared_case() -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        yield Case(Path(folder))


def clean(case: Case) -> None:
    for path in (case.root / "out").glob("*"):
        path.unlink()
    if (case.root / "out").exists():
        (case.root / "out").rmdir()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**40]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["F32", "BF16", "U8", "I64", "F4", "a.weight", "b.weight", "c.weight"]),
    st.lists(st.integers(-2, 9), max_size=5),
    st.lists(st.sampled_from([0, 1, 6, 4, 2**31, 2**62, 2**63]), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(value: object, here: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Every position in a JSON document."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*here, key))


@fuzz
@given(data=st.data())
def test_any_manifest_is_refused_or_right(shared_case: Case, data: st.DataObject) -> None:
    clean(shared_case)
    manifest: Any = copy.deepcopy(shared_case.manifest())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(manifest))))
        new = data.draw(ODD)
        if not place:
            manifest = new
            continue
        parent = manifest
        for key in place[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "delete", "rename"]))
        if action == "rename" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=10) | st.sampled_from(list(BASE)))] = parent.pop(place[-1])
        elif action == "delete":
            del parent[place[-1]]
        else:
            parent[place[-1]] = new
    survives(shared_case, shared_case.write(manifest=manifest))


@fuzz
@given(edits=EDITS)
@example(edits=[(0.0, "flip", b"\x80")])
def test_any_bytes_are_refused_or_right(shared_case: Case, edits: list[Edit]) -> None:
    clean(shared_case)
    path = shared_case.root / "bad"
    path.write_bytes(edited(shared_case.good.read_bytes(), edits))
    survives(shared_case, path)


@fuzz
@given(name=st.sampled_from(["a.weight", "b.weight"]), index=st.lists(st.integers(-3, 12), max_size=7))
def test_any_index_is_refused_or_right(shared_case: Case, name: str, index: list[int]) -> None:
    """The other entries are resized to fit, so that only the index can be wrong."""
    clean(shared_case)
    entries = dict(shared_case.entries)
    count = len(index)
    entries[f"{name}:index"] = "I32", np.array(index, "<i4").view("u4")
    for part in PARTS:
        kind, bits = entries[f"{name}:{part}"]
        entries[f"{name}:{part}"] = kind, np.resize(bits, (count, bits.shape[1]))
    survives(shared_case, shared_case.write(entries))
