"""The laws of lossless patches in place: the same bytes as a copy, and after a crash exactly the old ones.

These tests simulate a crash at every write, sync, rename and removal, and a loss of power by any mix of old
and new sectors. ``tests/torture/test_killed.py`` kills real processes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_support import BITS, Tensors, folder, tensor, touched
from support import snapshot

import neftsurgery as ns
from neftsurgery.checkpoint import journal
from neftsurgery.checkpoint.healing import heal_recorded
from neftsurgery.surgery import rewrite
from neftsurgery.tensors.header import read_header

law = settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}", "merges.txt": b"x", "README.md": b"# kept"}


def put(root: Path, tensors: Tensors, files: dict[str, bytes], shards: int = 1) -> Path:
    return folder(root, tensors, shards, files, {"format": "pt"})


def others(files: dict[str, bytes]) -> dict[str, bytes]:
    """One file changed, one removed, one added, one kept."""
    return {"config.json": b'{"a": 2}', "vocab.txt": b"new", **{n: files[n] for n in files if n > "t"}}


def state(root: Path) -> dict[str, tuple[int, str]]:
    """All files but those that a killed process leaves under a staging name."""
    return {name: entry for name, entry in snapshot(root).items() if ".neft-" not in name}


def weights(path: Path) -> dict[str, tuple[int, str]]:
    return {name: entry for name, entry in state(path).items() if name != "README.md"}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    first: Tensors = {}
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=2)))
        # Some tensors have several ranges of 64 kB, of which the last is not whole.
        shape = (*shape, 8) if number else (draw(st.sampled_from([3, 70_001])), 8)
        first[f"w.{number}"] = tensor(dtype, shape, rng)
    share = st.sampled_from([0, 1e-5, 0.3])
    return first, {name: touched(one, draw(share), rng) for name, one in first.items()}


@law
@given(pairs(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 2))
def test_in_place_equals_a_copy_and_revert_is_the_identity(
    sides: tuple[Tensors, Tensors], reversible: bool, fast: bool, weights_only: bool, shards: int
) -> None:
    shards = min(shards, len(sides[0]))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, tuned = root / "base", root / "tuned"
        put(base, sides[0], FILES, shards)
        put(tuned, sides[1], others(FILES), shards)
        options: dict[str, Any] = {"reversible": reversible, "fast": fast, "weights_only": weights_only}
        ns.extract(base, tuned, lossless=True, out=root / "p", **options).close()
        before = snapshot(base)
        ns.apply(base, root / "p", out=root / "copy")
        model = put(root / "model", sides[0], FILES, shards)
        ns.apply(model, root / "p", in_place=True)
        assert weights(model) == weights(root / "copy")
        assert (model / "README.md").read_bytes() == FILES["README.md"]
        stamps = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
        done = ns.apply(model, root / "p", in_place=True)
        assert not done.written
        assert stamps == {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
        ns.revert(model, root / "p", in_place=True, base=None if reversible else base)
        assert snapshot(model) == before == snapshot(base)


def test_a_chain_in_place_passes_through_other_layouts(tmp_path: Path) -> None:
    """Only the first and the last checkpoint must have the same files."""
    rng = np.random.default_rng(0)
    first = {"a": tensor("BF16", (90, 800), rng), "b": tensor("F32", (9,), rng)}
    middle = {**{name: touched(one, 0.1, rng) for name, one in first.items()}, "c": tensor("U8", (4,), rng)}
    last = {name: touched(middle[name], 0.1, rng) for name in first}
    paths = [put(tmp_path / "0", first, FILES), put(tmp_path / "1", middle, FILES, 2)]
    paths.append(put(tmp_path / "2", last, others(FILES)))
    for n in range(2):
        ns.extract(paths[n], paths[n + 1], lossless=True, out=tmp_path / f"p{n}").close()
    ns.apply(paths[0], [tmp_path / "p0", tmp_path / "p1"], in_place=True)
    assert weights(paths[0]) == weights(paths[2])


class Killed(BaseException):
    """Stands for SIGKILL: no exception handler of the package may catch it."""


@contextmanager
def killed_at(number: int) -> Iterator[list[int]]:
    """Do a part of the ``number``-th write, or none of another call, and end the work without clean-up."""
    calls = [0]
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace", "unlink")}

    def counted(name: str) -> Callable[..., object]:
        def call(*args: Any, **options: Any) -> object:
            calls[0] += 1
            if calls[0] < number:
                return real[name](*args, **options)
            if calls[0] == number and name == "pwrite":
                data = memoryview(args[1]).cast("B")
                real[name](args[0], data[: len(data) * 37 // 100], args[2])
            raise Killed

        return call

    with (
        mock.patch.multiple(os, **{name: counted(name) for name in real}),
        mock.patch.object(rewrite, "heal_recorded"),
    ):
        yield calls


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any], Path]:
    """A model, its files, those of the tuned one, and the patch; ranges of every kind."""
    rng = np.random.default_rng(1)
    first = {
        "long": tensor("F16", (70_001,), rng),
        "norm": tensor("BF16", (7,), rng),
        "kept": tensor("I64", (3,), rng),
        "packed": tensor("F4", (10, 16), rng),
    }
    second = {name: touched(one, 0 if name == "kept" else 0.3, rng) for name, one in first.items()}
    model = put(tmp_path / "model", first, FILES, 2)
    tuned = put(tmp_path / "tuned", second, others(FILES), 2)
    ns.extract(model, tuned, lossless=True, reversible=True, out=tmp_path / "p").close()
    ns.apply(model, tmp_path / "p", out=tmp_path / "copy")
    after = state(tmp_path / "copy")
    return model, state(model), {**after, "README.md": state(model)["README.md"]}, tmp_path / "p"


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_crash_at_any_call_leaves_the_old_bytes(sides, verb: str) -> None:
    model, before, after, patch = sides
    if verb == "revert":
        ns.apply(model, patch, in_place=True)
        before, after = after, before
    assert state(model) == before
    number = journals = torn = 0
    while state(model) == before:
        number += 1
        with suppress(Killed), killed_at(number):
            getattr(ns, verb)(model, patch, in_place=True)
        there = (model / ".neft-journal").exists()
        journals += there
        torn += there and state(model) not in (before, after)
        if there:
            with pytest.raises(ns.MachineError, match="heal"):
                ns.verify(model, patch)
        patch.rename(patch.with_name("away"))  # healing needs no patch
        assert (heal_recorded(model) is not None) == there
        patch.with_name("away").rename(patch)
        if there:
            assert state(model) == before, f"killed at call {number}"
    assert state(model) == after
    assert journals > 10
    assert torn > 5
    assert [name for name in os.listdir(model) if ".neft-" in name] == []


@contextmanager
def killed_at_the_end() -> Iterator[None]:
    """All is written, and the journal is there."""
    with (
        suppress(Killed),
        mock.patch.object(journal, "remove_journal", side_effect=Killed),
        mock.patch.object(rewrite, "heal_recorded"),
    ):
        yield


def test_healing_can_be_interrupted_too(sides) -> None:
    model, before, after, patch = sides
    with killed_at_the_end():
        ns.apply(model, patch, in_place=True)
    assert state(model) == after
    number = 0
    while (model / ".neft-journal").exists():
        number += 1
        with suppress(Killed), killed_at(number):
            ns.heal(model)
    assert state(model) == before
    assert number > 5


@law
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.sampled_from([1e-4, 0.5]))
def test_any_mix_of_old_and_new_sectors_heals(seed: int, share: float, changed: float) -> None:
    """After a loss of power, each disk sector is old or new, in any combination."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first = {"w": tensor("BF16", (150_001,), rng), "v": tensor("F32", (5, 11), rng)}
        second = {name: touched(one, changed, rng) for name, one in first.items()}
        model, tuned = put(root / "model", first, FILES), put(root / "tuned", second, others(FILES))
        ns.extract(model, tuned, lossless=True, out=root / "p").close()
        before, file = state(model), model / "model.safetensors"
        old, new = file.read_bytes(), (tuned / file.name).read_bytes()
        with killed_at_the_end():
            ns.apply(model, root / "p", in_place=True)
        assert file.read_bytes() == new
        starts = range(0, len(old), 512)
        file.write_bytes(b"".join((old if rng.random() < share else new)[at : at + 512] for at in starts))
        assert heal_recorded(model) is not None
        assert state(model) == before


def test_a_journal_is_not_applied_to_other_files(sides) -> None:
    model, before, _, patch = sides
    with killed_at_the_end():
        ns.apply(model, patch, in_place=True)
    (model / "config.json").write_bytes(b"edited since")
    with pytest.raises(ns.MismatchError, match=r"not written for config\.json"):
        ns.heal(model)
    (model / "config.json").write_bytes(b'{"a": 2}')
    rng, files = np.random.default_rng(2), {path: path.read_bytes() for path in model.glob("*.safetensors")}
    for path, content in files.items():
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + rng.bytes(len(content) - start))
    with pytest.raises(ns.MismatchError, match="not written for"):
        ns.heal(model)
    for path, content in files.items():
        path.write_bytes(content)
    ns.heal(model)
    assert state(model) == before


@pytest.mark.parametrize(
    "name", ["x.py", "../config.json", ".neft-journal", "config.json/", "model.safetensors"]
)
def test_a_forged_journal_names_no_other_file(sides, name: str) -> None:
    model, _, _, patch = sides
    with killed_at_the_end():
        ns.apply(model, patch, in_place=True)
    path = model / ".neft-journal"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = json.loads(path.read_bytes()[8 : 8 + size]), path.read_bytes()[8 + size :]
    content = json.loads(header["__metadata__"]["neft_journal"])
    assert content["version"] == 2
    content["side"][0]["name"] = name
    header[f"side:{name}"] = header.pop("side:config.json")
    header["__metadata__"]["neft_journal"] = json.dumps(content)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    left = snapshot(model.parent)
    with pytest.raises(ns.CorruptFileError, match="a file beside the weights is not described"):
        ns.heal(model)
    assert snapshot(model.parent) == left


def test_neuron_patches_still_write_the_first_version(tmp_path: Path) -> None:
    """An older program heals what it can, and refuses version 2 by its number."""
    rng = np.random.default_rng(3)
    first = {"a.weight": tensor("F32", (8, 6), rng)}
    sides = (
        put(tmp_path / "a", first, {}),
        put(tmp_path / "b", {"a.weight": touched(first["a.weight"], 0.5, rng)}, {}),
    )
    ns.extract(*sides, neurons=3, out=tmp_path / "p").close()
    with killed_at_the_end():
        ns.apply(sides[0], tmp_path / "p", in_place=True)
    header = read_header(sides[0] / ".neft-journal")
    assert json.loads(header.metadata["neft_journal"])["version"] == 1
