"""verify: base, patched, mixed or neither, per tensor and together; it never writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import patched_by_hand, raw_file, raw_folder, snapshot, vectors_of, with_vectors

import neftsurgery as ns
from neftsurgery.surgery.verify import TensorState

RNG = np.random.default_rng(0)
SHAPES = {"a.weight": (8, 6), "b.weight": (5, 9), "c": (2, 3, 4)}
AXES = {"a.weight": (0,), "b.weight": (1,), "c": (0, 2)}
BASE = {n: ("F16", RNG.integers(0, 1 << 14, shape, np.uint16)) for n, shape in SHAPES.items()}
TUNED = {n: (kind, bits ^ np.uint16(7)) for n, (kind, bits) in BASE.items()}
OTHER = {n: (kind, bits ^ np.uint16(1)) for n, (kind, bits) in BASE.items()}


@pytest.fixture
def patch(tmp_path: Path) -> ns.Patch:
    base, tuned = raw_folder(tmp_path / "base", BASE, 2), raw_folder(tmp_path / "tuned", TUNED)
    return ns.extract(base, tuned, changed=True, axis=AXES, out=tmp_path / "patch")


def state(root: Path, patch: ns.Patch, tensors: dict[str, tuple[str, np.ndarray]]) -> ns.Verification:
    path = raw_file(root / "m.safetensors", tensors)
    before = snapshot(root)
    found = ns.verify(path, patch)
    assert snapshot(root) == before
    return found


@pytest.mark.parametrize("a", ["base", "patched", "mixed", "neither"])
@pytest.mark.parametrize("b", ["base", "patched", "mixed", "neither"])
@pytest.mark.parametrize("c", ["base", "patched"])
def test_every_combination_of_tensors(tmp_path: Path, patch: ns.Patch, a: str, b: str, c: str) -> None:
    tensors, wanted = {}, {"a.weight": a, "b.weight": b, "c": c}
    for name, which in wanted.items():
        sides = {"base": BASE, "patched": TUNED, "mixed": BASE, "neither": BASE}
        kind, bits = sides[which][name]
        if which in ("mixed", "neither"):
            rows = np.array([0, 3])
            source = (TUNED if which == "mixed" else OTHER)[name][1]
            bits = with_vectors(bits, AXES[name], rows, vectors_of(source, AXES[name])[rows])
        tensors[name] = kind, bits
    found = state(tmp_path, patch, tensors)
    assert {name: tensor.state for name, tensor in found.tensors.items()} == wanted
    states = {a, b, c}
    together = (
        "neither" if "neither" in states
        else "mixed" if states & {"mixed"} or states == {"base", "patched"}
        else states.pop()
    )  # fmt: skip
    assert found.state == together
    assert found.holds() is (together in ("base", "patched"))
    assert found.holds("base") is (together == "base")
    assert found.holds("patched") is (together == "patched")


def test_it_counts_vectors(tmp_path: Path, patch: ns.Patch) -> None:
    kind, bits = BASE["b.weight"]
    for rows, source in (([1, 2, 8], TUNED), ([4], OTHER)):
        bits = with_vectors(bits, (1,), np.array(rows), vectors_of(source["b.weight"][1], (1,))[rows])
    found = state(tmp_path, patch, BASE | {"b.weight": (kind, bits)})
    assert found.tensors["b.weight"] == TensorState(base=5, patched=3, both=0, neither=1)
    assert found.tensors["a.weight"] == TensorState(base=8)


def test_vectors_that_the_patch_does_not_change_are_both(tmp_path: Path) -> None:
    """Neurons that were chosen but are equal on both sides fit either state."""
    half = {name: (kind, bits.copy()) for name, (kind, bits) in BASE.items()}
    half["a.weight"][1][5] ^= 9
    base, tuned = raw_file(tmp_path / "base", BASE), raw_file(tmp_path / "tuned", half)
    everything = ns.extract(base, tuned, neurons="100%", axis=AXES, out=tmp_path / "patch")
    found = ns.verify(base, everything)
    assert found.tensors["a.weight"] == TensorState(base=1, both=7)
    assert found.tensors["b.weight"] == TensorState(both=9)
    assert (found.tensors["a.weight"].state, found.tensors["b.weight"].state) == ("base", "patched")
    assert found.state == "base"
    assert found.holds("base")
    assert not found.holds("patched")
    found = ns.verify(tuned, everything)
    assert found.state == "patched"
    assert found.holds("patched")
    same = ns.extract(base, base, neurons="100%", axis=AXES, out=tmp_path / "same")
    found = ns.verify(base, same)
    assert found.state == "patched"
    assert found.holds("base")
    assert found.holds("patched")


def test_tensors_beside_the_patch_do_not_matter(tmp_path: Path, patch: ns.Patch) -> None:
    more = patched_by_hand(BASE, tmp_path / "patch") | {"z": ("F32", np.zeros(3, "u4"))}
    assert state(tmp_path, patch, more).state == "patched"


CHANGED = {
    "missing": ({}, "expected F16 [8, 6], found no such tensor"),
    "another shape": ({"a.weight": ("F16", np.zeros((8, 5), "u2"))}, "expected F16 [8, 6], found F16 [8, 5]"),
    "another type": (
        {"a.weight": ("BF16", np.zeros((8, 6), "u2"))},
        "expected F16 [8, 6], found BF16 [8, 6]",
    ),
}


@pytest.mark.parametrize(("instead", "says"), CHANGED.values(), ids=CHANGED)
def test_another_model(tmp_path: Path, patch: ns.Patch, instead: dict, says: str) -> None:
    tensors = {name: entry for name, entry in BASE.items() if name != "a.weight"} | instead
    with pytest.raises(ns.MismatchError) as caught:
        state(tmp_path, patch, tensors)
    for word in (
        says,
        "a.weight",
        str(tmp_path / "patch"),
        str(tmp_path / "m.safetensors"),
        "made from base",
    ):
        assert word in str(caught.value)


def test_a_read_only_checkpoint(tmp_path: Path, patch: ns.Patch) -> None:
    base = tmp_path / "base"
    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    try:
        assert ns.verify(base, patch).state == "base"
    finally:
        base.chmod(0o755)


def test_it_says_what_it_read(tmp_path: Path, patch: ns.Patch) -> None:
    found = ns.verify(tmp_path / "base", patch)
    assert found.timing.bytes_read >= sum(bits.nbytes for _, bits in BASE.values())
    assert found.timing.seconds > 0


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_matter(tmp_path: Path, patch: ns.Patch, threads: int) -> None:
    assert ns.verify(tmp_path / "base", patch, threads=threads).tensors == {
        name: TensorState(base=patch.tensors[name].count) for name in SHAPES
    }


def test_a_path_or_an_open_patch(tmp_path: Path, patch: ns.Patch) -> None:
    for named in (patch, tmp_path / "patch", str(tmp_path / "patch")):
        assert ns.verify(str(tmp_path / "base"), named).state == "base"
