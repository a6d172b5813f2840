"""The patch as a value: a manifest and a reader of rows."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from support import patched_by_hand, raw_file, raw_folder, raw_read, snapshot, vectors_of

import neftsurgery as ns
from neftsurgery.checkpoint.provenance import Provenance
from neftsurgery.neurons.layout import Layout
from neftsurgery.patch.overlap import overlay
from neftsurgery.patch.patch import Manifest, PatchTensor
from neftsurgery.patch.patch_file import DigestHash, digests
from neftsurgery.patch.write import NewPatch
from neftsurgery.selection.selection import Chosen, SelectionFacts
from neftsurgery.storage.threads import DEFAULT_MEMORY, Limits
from neftsurgery.surgery.apply import plan_apply, plan_revert
from neftsurgery.surgery.extract import plan_extract
from neftsurgery.surgery.verify import plan_verify
from neftsurgery.tensors.header import TensorInfo

AXIS = {"b.weight": 1, "c": (0, 2)}
AXES = {"a.weight": (0,), "b.weight": (1,), "c": (0, 2)}
SHAPES = {"a.weight": (9, 5), "b.weight": (4, 30), "c": (2, 3, 4), "untouched.weight": (3, 3)}


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {n: ("BF16", rng.integers(0, 1 << 14, shape, np.uint16)) for n, shape in SHAPES.items()}
    tuned = {n: (k, bits ^ np.uint16(n != "untouched.weight")) for n, (k, bits) in base.items()}
    return raw_folder(tmp_path / "base", base), raw_folder(tmp_path / "tuned", tuned)


def cut(sides: tuple[Path, Path], out: Path | None, **options: object) -> ns.Patch:
    return ns.extract(*sides, axis=AXIS, out=out, **({"changed": True} | options))


def test_what_it_says_of_itself(sides: tuple[Path, Path], tmp_path: Path) -> None:
    patch = cut(sides, tmp_path / "p", reversible=True)
    assert list(patch.tensors) == ["a.weight", "b.weight", "c"]
    assert {name: tensor.layout.axes for name, tensor in patch.tensors.items()} == AXES
    assert {name: tensor.count for name, tensor in patch.tensors.items()} == {
        "a.weight": 9, "b.weight": 30, "c": 8
    }  # fmt: skip
    assert patch.neurons == len(patch.selection) == 47
    assert patch.parameters == 45 + 120 + 24
    assert patch.value_bytes == 2 * patch.parameters
    assert patch.nbytes == (tmp_path / "p").stat().st_size
    assert patch.path == tmp_path / "p"
    assert patch.name == str(tmp_path / "p")
    assert patch.reversible
    assert patch.base["name"] == "base"
    assert patch.facts["budget"] == {"changed": True}
    assert patch.selection.facts == patch.facts
    for name in patch.tensors:
        np.testing.assert_array_equal(patch.selection.tensors[name].index, patch.index(name))


def test_rows_are_read_in_any_range(sides: tuple[Path, Path], tmp_path: Path) -> None:

    patch = cut(sides, tmp_path / "p", reversible=True)
    base, tuned = raw_read(sides[0]), raw_read(sides[1])
    for name, axes in AXES.items():
        old, new = (
            np.ascontiguousarray(vectors_of(side[name][1], axes)).view("u1") for side in (base, tuned)
        )
        count = patch.tensors[name].count
        assert patch.index(name).dtype == np.int64
        for start, stop in ((0, None), (0, 0), (0, 1), (2, 5), (count - 1, count), (count, count)):
            np.testing.assert_array_equal(patch.values(name, start, stop), new[start:stop])
            np.testing.assert_array_equal(patch.base_values(name, start, stop), old[start:stop])
            np.testing.assert_array_equal(patch.base_digests(name, start, stop), digests(old[start:stop]))


def test_without_a_path_it_lives_in_a_nameless_file(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = snapshot(tmp_path)
    patch = cut(sides, None)
    assert snapshot(tmp_path) == before
    assert patch.path is None
    assert patch.name == "the patch"
    patch.check()
    ns.apply(sides[0], patch, out=tmp_path / "out")
    assert ns.verify(tmp_path / "out", patch).state == "patched"
    patch.save(tmp_path / "saved")
    cut(sides, tmp_path / "direct").close()
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "direct").read_bytes()
    with ns.Patch.load(tmp_path / "saved") as loaded:
        assert loaded.manifest == patch.manifest


def test_a_nameless_patch_is_given_back_when_it_is_dropped(sides: tuple[Path, Path]) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to count open files in")
    gc.collect()  # what earlier tests left to collect may hold files too
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        cut(sides, None)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_save_keeps_what_is_there(sides: tuple[Path, Path], tmp_path: Path) -> None:
    patch = cut(sides, tmp_path / "p")
    (tmp_path / "taken").write_bytes(b"mine")
    before = snapshot(tmp_path)
    with pytest.raises(ns.UsageError, match=r"(?s)taken.*force=True"):
        patch.save(tmp_path / "taken")
    with pytest.raises(ns.UsageError, match="does not exist"):
        patch.save(tmp_path / "no" / "where")
    assert snapshot(tmp_path) == before
    patch.save(tmp_path / "taken", force=True)
    assert (tmp_path / "taken").read_bytes() == (tmp_path / "p").read_bytes()


def test_saving_over_itself(sides: tuple[Path, Path], tmp_path: Path) -> None:
    patch = cut(sides, tmp_path / "p")
    content = (tmp_path / "p").read_bytes()
    patch.save(tmp_path / "p", force=True)
    assert (tmp_path / "p").read_bytes() == content
    patch.check()


def test_extract_refuses_to_replace_a_patch(sides: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"mine")
    before = snapshot(tmp_path)
    with pytest.raises(ns.UsageError, match="exists already"):
        cut(sides, tmp_path / "p")
    assert snapshot(tmp_path) == before
    cut(sides, tmp_path / "p", force=True).check()


def test_neurons_do_not_count_followers(tmp_path: Path) -> None:
    bits = np.arange(12, dtype="u4").reshape(4, 3)
    tensors = {"l.weight": ("F32", bits), "l.bias": ("F32", bits[:, 0].copy())}
    base = raw_file(tmp_path / "base", tensors)
    tuned = raw_file(
        tmp_path / "tuned", {name: (kind, b + np.uint32(1)) for name, (kind, b) in tensors.items()}
    )
    patch = ns.extract(base, tuned, neurons=2, score="l2", with_bias=True, out=tmp_path / "p")
    assert (patch.neurons, patch.parameters) == (2, 8)
    assert patch.selection.counts == {"l.weight": 2}
    np.testing.assert_array_equal(patch.index("l.bias"), patch.index("l.weight"))


@pytest.mark.parametrize("names", [["a", "b", "c", "ä"], ["ä", "c", "a", "b"]])
def test_the_order_of_a_selection_does_not_matter(names: list[str], tmp_path: Path) -> None:
    rows = {name: np.full((2, 3), ord(name[0]) % 251, np.uint8) for name in names}
    chosen = {
        name: Chosen(TensorInfo(name, "U8", (9, 3)), Layout((9, 3), (0,)), np.array([number, number + 4]))
        for number, name in enumerate(names)
    }
    manifest = Manifest.of(Provenance({}), SelectionFacts({}))
    with NewPatch(ns.Selection(chosen, {}), manifest, True).written(tmp_path / "p") as writer:
        writer.write_blocks(lambda part: (rows[part.name], rows[part.name] + 1, digests(rows[part.name] + 1)))
    with ns.Patch.load(tmp_path / "p") as patch:
        patch.check()
        assert list(patch.tensors) == sorted(names)
        for number, name in enumerate(names):
            assert patch.index(name).tolist() == [number, number + 4]
            np.testing.assert_array_equal(patch.values(name), rows[name])
            np.testing.assert_array_equal(patch.base_values(name), rows[name] + 1)


def test_check_finds_damage_that_loading_does_not(sides: tuple[Path, Path], tmp_path: Path) -> None:
    patch = cut(sides, tmp_path / "p")
    data = bytearray((tmp_path / "p").read_bytes())
    position = data.rindex(patch.values("c", 7, 8).tobytes())
    data[position] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    damaged = ns.Patch.load(tmp_path / "damaged")
    with pytest.raises(ns.CorruptFileError, match=r"damaged.*tensor c.*patched_hash") as caught:
        damaged.check()
    assert caught.value.tensor == "c"
    patch.check()


def test_a_file_that_shrinks_while_it_is_open(sides: tuple[Path, Path], tmp_path: Path) -> None:
    patch = cut(sides, tmp_path / "p")
    os.truncate(tmp_path / "p", patch.nbytes - 1000)
    with pytest.raises(ns.CorruptFileError, match="too soon"):
        patch.check()
    with pytest.raises(ns.CorruptFileError, match="too soon"):
        ns.apply(sides[0], patch, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_digests_do_not_depend_on_blocks() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, 33), np.uint8)
    whole = digests(rows)
    assert whole.shape == (50, 16)
    assert digests(rows[:0]).shape == (0, 16)
    np.testing.assert_array_equal(np.concatenate([digests(rows[:7]), digests(rows[7:])]), whole)
    strided = np.zeros((50, 66), np.uint8)[:, ::2]
    strided[:] = rows
    np.testing.assert_array_equal(digests(strided), whole)
    once, parts = DigestHash(), DigestHash()
    once.update(whole)
    for part in np.split(whole, 5):
        parts.update(part)
    assert once.text() == parts.text() != DigestHash().text()


@pytest.mark.parametrize("mine", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("theirs", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_overlay_puts_one_patch_over_another(
    tmp_path: Path, mine: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    """Whatever axes the two cut one tensor along; the oracle writes into the whole tensor."""

    rng = np.random.default_rng(hash((mine, theirs)) % 1000)
    old, new = (rng.integers(0, 1 << 30, (4, 5, 6), np.uint32) for _ in range(2))
    files = [raw_file(tmp_path / name, {"t": ("F32", bits)}) for name, bits in (("b", old), ("t", new))]
    patch = ns.extract(*files, neurons="40%", score="random", axis={"t": theirs}, out=tmp_path / "p")
    layout = Layout((4, 5, 6), mine)
    index = np.sort(rng.permutation(layout.count)[: max(1, layout.count // 2)])
    tensor = PatchTensor(TensorInfo("t", "F32", (4, 5, 6)), layout, len(index), "", "", False)
    found = np.ascontiguousarray(vectors_of(old, mine)[index]).view("u1")
    overlay(found, index, tensor, patch)

    expected = vectors_of(patched_by_hand({"t": ("F32", old)}, tmp_path / "p")["t"][1], mine)[index]
    np.testing.assert_array_equal(found.view("u4"), expected)


def test_blocks_of_any_size_give_the_same_patch(sides: tuple[Path, Path], tmp_path: Path) -> None:
    cut(sides, tmp_path / "large", reversible=True).close()
    for threads in (1, 3):
        limits = Limits(threads, DEFAULT_MEMORY, block=16)
        small, out = tmp_path / f"small{threads}", tmp_path / f"out{threads}"
        options = {"axis": AXIS, "changed": True}
        plan = plan_extract(*sides, **options, out=small, reversible=True, limits=limits)
        patch = plan.run(limits=limits)
        assert small.read_bytes() == (tmp_path / "large").read_bytes()
        patch.check(limits=limits)
        plan_apply(sides[0], [patch], out=out, limits=limits).run(limits=limits)
        assert plan_verify(out, patch).run(limits=limits).state == "patched"
        plan_revert(out, patch, in_place=True, limits=limits).run(limits=limits)
        assert snapshot(out) == snapshot(sides[0])
        plan_apply(out, [patch], in_place=True, limits=limits).run(limits=limits)
        assert plan_verify(out, patch).run(limits=limits).state == "patched"
