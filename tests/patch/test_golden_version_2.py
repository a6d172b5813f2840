"""Neuron patches of version 2 as they are written down: they must load, verify, apply and revert for ever."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from golden_neuron_patches import BASE, HERE, PATCHES, changed, write
from support import assert_same_tensors, patched_by_hand, raw_file, raw_read, vectors_of

import neftsurgery as ns

#: The SHA-256 of each patch, and of the file that it makes of the base. Never to be changed.
GOLDEN = {
    "reversible": (
        "7a0432634895ce80f7d8e7acf28cc42154e89c4831753d85c7dc87024dbd7523",
        "cfafc39ad111acc7b8d983c29442073d2e91bc3a259d9f4a2bcaa9eae50d79c8",
    ),
    "in-part": (
        "7df5d77c2b6526e984b7091789c3792394f6869c7a0f038618bf551c2a250f95",
        "7562b0bb5b6a9c5eb5fb92be57a25b06bdee3bab65514ff750b718951a308358",
    ),
}
BASE_SHA256 = "30ab3f5099a7be3366553c71fdd9fabc54d9180743ab11008d522a18bc00567e"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def path_of(name: str) -> Path:
    return HERE / f"neurons-{name}.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = raw_file(tmp_path / "base.safetensors", BASE)
    assert sha256(path) == BASE_SHA256
    return path


@pytest.mark.parametrize("name", PATCHES)
def test_the_files_are_those_that_were_recorded(name: str, tmp_path: Path) -> None:
    assert sha256(path_of(name)) == GOLDEN[name][0]
    assert write(name, tmp_path).read_bytes() == path_of(name).read_bytes()


@pytest.mark.parametrize("name", PATCHES)
def test_what_they_say(name: str) -> None:
    _, chosen = PATCHES[name]
    with ns.Patch.load(path_of(name)) as patch:
        patch.check()
        assert list(patch.tensors) == sorted(chosen)
        assert patch.reversible == (name == "reversible")
        for tensor, (axes, neurons, reversible) in chosen.items():
            bits = BASE[tensor][1]
            old, new = (vectors_of(b, axes)[neurons].tobytes() for b in (bits, changed(bits)))
            assert patch.tensors[tensor].layout.axes == tuple(axes)
            assert patch.tensors[tensor].reversible == reversible
            assert patch.index(tensor).tolist() == neurons
            assert patch.values(tensor).tobytes() == new
            if reversible:
                assert patch.base_values(tensor).tobytes() == old
        assert patch.manifest["unknown"] == {"ünï": [1.0, 0.0, 1e22]}
        assert patch.facts.captured == 1e-05


@pytest.mark.parametrize("name", PATCHES)
def test_what_they_make_and_back(name: str, base: Path, tmp_path: Path) -> None:
    patch, out = path_of(name), tmp_path / "out.safetensors"
    assert ns.verify(base, patch).state == "base"
    ns.apply(base, patch, out=out)
    assert sha256(out) == GOLDEN[name][1]
    assert_same_tensors(raw_read(out), patched_by_hand(BASE, patch))
    assert ns.verify(out, patch).state == "patched"
    ns.revert(out, patch, base=None if name == "reversible" else base, in_place=True)
    assert sha256(out) == BASE_SHA256


def test_extract_writes_what_they_say(base: Path, tmp_path: Path) -> None:
    """The same neurons, cut out by this package: the same entries, bit for bit."""
    golden = path_of("reversible")
    tuned = raw_file(tmp_path / "tuned.safetensors", patched_by_hand(BASE, golden))
    known = ns.Patch.load(golden)
    with ns.extract(base, tuned, known.selection, reversible=True, out=tmp_path / "p") as fresh:
        assert fresh.manifest["tensors"] == known.manifest["tensors"]
    assert_same_tensors(raw_read(tmp_path / "p"), raw_read(golden))
