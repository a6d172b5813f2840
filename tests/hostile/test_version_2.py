"""Neuron patches of version 2 that are damaged or forged: refused with a message, and nothing is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    assert_same_tensors,
    patch_manifest,
    patched_by_hand,
    raw_file,
    raw_folder,
    raw_read,
    sealed,
    snapshot,
)

import neftsurgery as ns

fuzz = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))

BASE = {
    "a.weight": ("BF16", np.arange(100, 124, dtype="u2").reshape(6, 4)),
    "b.weight": ("F32", np.arange(1000, 1035, dtype="u4").reshape(5, 7)),
    "c.weight": ("BF16", np.arange(300, 306, dtype="u2").reshape(2, 3)),
    "d.weight": ("F32", np.arange(2000, 2006, dtype="u4").reshape(2, 3)),
}
TUNED = {name: (kind, bits + bits.dtype.type(5000)) for name, (kind, bits) in BASE.items()}


ENTRIES = ["index", "base_digest", "value:BF16", "value:F32", "base:BF16", "base:F32"]


class Case:
    """A folder with a base and a valid reversible patch on rows of ``a`` and ``c`` and columns of ``b``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = raw_folder(root / "base", BASE, 2)
        self.good = root / "good"
        tuned = raw_folder(root / "tuned", TUNED)
        options = {"axis": {"b.weight": 1}, "only": ["a.*", "b.*", "c.*"], "score": "random"}
        ns.extract(self.base, tuned, neurons="60%", reversible=True, out=self.good, **options).close()
        ns.apply(self.base, self.good, out=root / "patched")
        self.expected = raw_read(root / "patched")
        self.reset()

    def reset(self) -> None:
        """All parts as they are in the valid patch."""
        found = sorted(raw_read(self.good).items())
        self.entries = {name: (kind, bits.copy()) for name, (kind, bits) in found}
        self.manifest: dict[str, Any] = patch_manifest(self.good)

    def write(self, *, fitting: bool = True) -> Path:
        """The patch; ``fitting``: with the hash that its parts have."""
        index = self.entries.get("index", ("I32", np.zeros(0, "u4")))[1].tobytes()
        metadata = {"neuron_patch": json.dumps(self.manifest, separators=(",", ":"))}
        metadata = sealed(self.manifest, [("index", index)]) if fitting else metadata
        return raw_file(self.root / "bad", self.entries, metadata)

    def refused(
        self, patch: Path, error: type[ns.NeftError] | tuple[type[ns.NeftError], ...], says: str = "."
    ) -> None:
        """Every verb refuses it, and changes no file or folder."""
        before = snapshot(self.root)
        patched, out = self.root / "patched", self.root / "out"
        for verb in (
            lambda: ns.apply(self.base, patch, out=out),
            lambda: ns.apply(self.base, [self.good, patch], out=out),
            lambda: ns.apply(self.base, patch, in_place=True),
            lambda: ns.verify(self.base, patch),
            lambda: ns.revert(patched, patch, in_place=True),
            lambda: ns.revert(patched, patch, base=self.base, out=out),
            lambda: ns.merge([self.good, patch], on_overlap="first", out=out),
        ):
            with pytest.raises(error, match=says) as caught:
                verb()
            assert len(str(caught.value)) < 2000
        assert snapshot(self.root) == before


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("position", [0, 0.3, 1])
@pytest.mark.parametrize(
    "entry", ["index", "base_digest", "value:BF16", "value:F32", "base:BF16", "base:F32"]
)
def test_one_flipped_bit_of_any_entry(case: Case, entry: str, position: float) -> None:
    raw = case.entries[entry][1].reshape(-1).view("u1")
    raw[int(position * (len(raw) - 1))] ^= 1
    path, errors = case.write(fitting=False), (ns.CorruptFileError,)
    if entry == "index":
        case.refused(path, errors, "the patch does not match its hash")
        return
    ns.Patch.load(path).close()
    if entry == "base_digest":
        errors += (ns.MismatchError,)  # merge compares the patches' bases first
    case.refused(path, errors, "do not match|different bases")


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "neuron axes": lambda m: m["tensors"]["c.weight"].update(neuron_axes=[0], shape=[2, 3], extra=1),
    "name of the base": lambda m: m["base"].update(name="another"),
    "fingerprint": lambda m: m["base"].update(fingerprint=f"xxh3-128:{1:032}"),
    "companion biases": lambda m: m["selection"].update(followers=["a.weight"]),
    "a key more": lambda m: m.update(more=None),
    "order of keys": lambda m: m.update(base=m.pop("base")),
    "no hash": lambda m: m.pop("content_hash"),
    "an empty hash": lambda m: m.update(content_hash=""),
    "a short hash": lambda m: m.update(content_hash="x"),
    "a hash of zeros": lambda m: m.update(content_hash=f"xxh3-128:{0:032}"),
    "a hash of another type": lambda m: m.update(content_hash=5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_was_altered(case: Case, change: Callable[[dict[str, Any]], object]) -> None:
    ns.Patch.load(case.write(fitting=False)).close()
    change(case.manifest)
    case.refused(case.write(fitting=False), ns.CorruptFileError, "does not match its hash")


def test_any_flipped_bit_of_the_manifest(case: Case) -> None:
    content = case.good.read_bytes()
    start, stop = content.index(b"neuron_patch"), content.index(b'"data_offsets"')
    path = case.root / "bad"
    for position in range(start, stop, 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ns.CorruptFileError):
            ns.Patch.load(path)


ROWS: list[Any] = [None, -1, 2.0, "2", True, [2], 0, 1, 7, 2**31, 2**62, 2**63, 2**64, 10**30]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_that_make_no_sense(case: Case, rows: Any) -> None:
    case.manifest["tensors"]["a.weight"]["rows"] = rows
    case.refused(case.write(), ns.CorruptFileError, "rows|does not fit")


def test_rows_that_are_missing(case: Case) -> None:
    del case.manifest["tensors"]["a.weight"]["rows"]
    case.refused(case.write(), ns.CorruptFileError, "a.weight.*rows")


def test_rows_whose_sum_is_right_but_not_they(case: Case) -> None:
    """The rows that lie behind one another are then cut in other places: their hashes do not fit."""
    tensors = case.manifest["tensors"]
    tensors["a.weight"]["rows"] -= 1
    tensors["b.weight"]["rows"] += 1
    case.refused(case.write(), ns.CorruptFileError)


def test_rows_whose_sum_no_integer_holds(case: Case) -> None:
    for entry in case.manifest["tensors"].values():
        entry.update(shape=[2**61, 1], rows=2**61, neuron_axes=[0])
    case.refused(case.write(), ns.CorruptFileError, "index does not fit")


@pytest.mark.parametrize("value", [None, 1, 0, "true", []], ids=str)
def test_a_reversible_that_is_neither_true_nor_false(case: Case, value: Any) -> None:
    case.manifest["tensors"]["a.weight"]["reversible"] = value
    case.refused(case.write(), ns.CorruptFileError, "a.weight.*reversible")


@pytest.mark.parametrize("value", [False, ...])
def test_replaced_values_that_no_tensor_has(case: Case, value: Any) -> None:
    for name in ("a.weight", "c.weight"):
        case.manifest["tensors"][name]["reversible"] = value
        if value is ...:
            del case.manifest["tensors"][name]["reversible"]
    case.refused(case.write(), ns.CorruptFileError, "belongs to no tensor")


def test_a_patch_that_is_reversible_in_part(case: Case) -> None:
    """Legal, as in version 1: it is not reversible by itself."""
    case.manifest["tensors"]["c.weight"]["reversible"] = False
    kind, bits = case.entries["base:BF16"]
    width = 3 * case.manifest["tensors"]["c.weight"]["rows"]
    case.entries["base:BF16"] = kind, bits[: len(bits) - width]
    path = case.write()
    with ns.Patch.load(path) as patch:
        patch.check()
        assert not patch.reversible
        assert [tensor.reversible for tensor in patch.tensors.values()] == [True, True, False]
    with pytest.raises(ns.UsageError, match=r"with base=\.\.\."):
        ns.revert(case.root / "patched", path, out=case.root / "out")
    ns.revert(case.root / "patched", path, base=case.base, out=case.root / "out")
    assert_same_tensors(raw_read(case.root / "out"), BASE)
    assert_same_tensors(case.expected, patched_by_hand(BASE, path))


@pytest.mark.parametrize(
    "entry", ["index", "base_digest", "value:BF16", "value:F32", "base:BF16", "base:F32"]
)
def test_an_entry_that_is_missing_or_of_another_shape(case: Case, entry: str) -> None:
    kind, bits = case.entries.pop(entry)
    case.refused(case.write(), ns.CorruptFileError, f"{entry} does not fit")
    wrong = {
        "too short": (kind, bits[:-1]),
        "too long": (kind, np.concatenate([bits, bits[:1]])),
        "an axis more": (kind, bits[None]),
        "another dtype": ("I8" if bits.itemsize == 1 else "U16" if bits.itemsize == 2 else "U32", bits),
        "empty": (kind, bits[:0]),
    }
    for name, (dtype, other) in wrong.items():
        case.entries[entry] = dtype, np.ascontiguousarray(other)
        case.refused(case.write(), ns.CorruptFileError, "does not fit"), name


@pytest.mark.parametrize(
    "name", ["junk", "a.weight:index", "value:F16", "base:F64", "value:", "value", "base", "Index", "code"]
)
def test_an_entry_left_over(case: Case, name: str) -> None:
    case.entries[name] = "U8", np.zeros(3, "u1")
    case.refused(case.write(), ns.CorruptFileError, "belongs to no tensor")


INDICES = {
    "out of range": [0, 6],
    "negative": [-1, 2],
    "unsorted": [3, 1],
    "a duplicate": [2, 2],
    "at the end of the integers": [0, 2**31 - 1],
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_that_makes_no_sense(case: Case, index: list[int]) -> None:
    case.entries["index"][1].view("<i4")[:2] = index
    case.refused(case.write(), ns.CorruptFileError, "out of range|not ascending")


def test_indices_of_neighbours_are_not_compared(case: Case) -> None:
    """The last index of a tensor may be above the first of the next; every one is checked by itself."""
    rows = [case.manifest["tensors"][name]["rows"] for name in sorted(case.manifest["tensors"])]
    index = case.entries["index"][1].view("<i4")
    assert index[rows[0] - 1] > index[rows[0]]
    index[rows[0]] = -1
    case.refused(case.write(), ns.CorruptFileError, "b.weight.*out of range")


@pytest.mark.parametrize("kind", ["", "neuron", "Neurons", None, 5, [], {}, True, "x" * 10_000], ids=ascii)
def test_a_kind_that_is_not_known(case: Case, kind: Any) -> None:
    case.manifest["kind"] = kind
    case.refused(case.write(), ns.CorruptFileError, "(?s)kind.*expected neurons or lossless.*update")


def test_a_patch_of_one_kind_that_says_the_other(case: Case) -> None:
    case.manifest["kind"] = "lossless"
    case.refused(case.write(), ns.NeftError)
    del case.manifest["kind"]
    case.refused(case.write(), ns.CorruptFileError, "kind")


def test_a_version_from_the_future(case: Case) -> None:
    case.manifest["version"] = 3
    case.refused(case.write(), ns.CorruptFileError, r"newer version \(expected 2 or older, found 3\)")


def test_version_1_with_the_entries_of_version_2(case: Case) -> None:
    case.manifest["version"] = 1
    case.refused(case.write(), ns.CorruptFileError, "no index")


GROUP = {"layout": "fp8-block", "members": {"codes": "a.weight", "scales": "b.weight"}}
GROUPS: dict[str, Any] = {
    "null": None,
    "an object": {},
    "a text": "fp8",
    "a list of lists": [[]],
    "no layout": [{"members": GROUP["members"]}],
    "a layout of another type": [GROUP | {"layout": 5}],
    "no members": [{"layout": "fp8"}],
    "a list of members": [GROUP | {"members": ["a.weight"]}],
    "a member that is not there": [GROUP | {"members": {"codes": "d.weight"}}],
    "a member of another type": [GROUP | {"members": {"codes": ["a.weight"]}}],
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_that_make_no_sense(case: Case, groups: Any) -> None:
    case.manifest["groups"] = groups
    case.refused(case.write(), ns.CorruptFileError, "group")


def test_a_group_that_cannot_be_judged(case: Case) -> None:
    """Codes without their scales make nonsense: whoever does not know the layout leaves the patch alone."""
    case.manifest["groups"] = [GROUP]
    case.refused(case.write(), ns.CorruptFileError, r"(?s)layout.*not know: 'fp8-block'.*pip install -U")


def test_a_patch_without_groups(case: Case) -> None:
    case.manifest["groups"] = []
    ns.apply(case.base, case.write(), out=case.root / "out")
    assert_same_tensors(raw_read(case.root / "out"), case.expected)


def test_a_patch_without_tensors(case: Case) -> None:
    case.manifest["tensors"] = {}
    case.entries = {"index": ("I32", np.zeros(0, "u4")), "base_digest": ("U8", np.zeros((0, 16), "u1"))}
    path = case.write()
    assert ns.verify(case.base, path).neurons == 0
    ns.apply(case.base, path, out=case.root / "out")
    assert_same_tensors(raw_read(case.root / "out"), BASE)


def test_indices_of_eight_bytes_are_read_as_well(case: Case) -> None:
    case.entries["index"] = "I64", case.entries["index"][1].view("<i4").astype("<i8").view("u8")
    ns.apply(case.base, case.write(), out=case.root / "out")
    assert_same_tensors(raw_read(case.root / "out"), case.expected)


@pytest.fixture(scope="module")
def shared_case() -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as name:
        yield Case(Path(name))


def places(value: object, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every position in a JSON document but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*here, key)
        yield from places(child, (*here, key))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, -1, 2**31, 2**62, 2**63, 10**40, "F32", "BF16", "F4", "a.weight", "neurons"]),
    st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@fuzz
@given(data=st.data())
def test_anything_with_a_fitting_hash_is_refused_or_right(shared_case: Case, data: st.DataObject) -> None:
    case = shared_case
    case.reset()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(list(places(case.manifest))))
        parent: Any = case.manifest
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = data.draw(ODD)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(list(case.entries)))
        raw = case.entries[name][1].reshape(-1).view("u1")
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path = case.write()
    before = snapshot(case.root)
    try:
        ns.verify(case.base, path)
        ns.apply(case.base, path, out=case.root / "out", force=True)
    except ns.NeftError:
        assert snapshot(case.root) == before
    else:
        assert_same_tensors(raw_read(case.root / "out"), patched_by_hand(BASE, path))
