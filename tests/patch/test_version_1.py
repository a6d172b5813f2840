"""Neuron patches of version 1, which nothing writes any more: every verb takes them as it takes new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import as_version_1, assert_same_tensors, patch_manifest, patch_rows, snapshot, write_folder

import neftsurgery as ns

SHAPES = {"0.weight": (6, 5), "0.bias": (6,), "1.weight": (4, 6)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, a tuned checkpoint; patches ``p`` (reversible) and ``q`` of both versions."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tuned = {name: array + np.float32(0.5) for name, array in base.items()}
    write_folder(tmp_path / "base", base, 2)
    write_folder(tmp_path / "tuned", tuned)
    for seed, name in enumerate("pq"):
        options: dict[str, Any] = {"policy": "random", "seed": seed, "reversible": True}
        sides = tmp_path / "base", tmp_path / "tuned"
        ns.extract(*sides, neurons="60%", **options, out=tmp_path / f"{name}2").close()
        (tmp_path / f"{name}1").write_bytes((tmp_path / f"{name}2").read_bytes())
        as_version_1(tmp_path / f"{name}1")
        assert [patch_manifest(tmp_path / f"{name}{n}")["version"] for n in (1, 2)] == [1, 2]
    return tmp_path


def test_they_are_the_same_patch(folder: Path) -> None:
    with ns.Patch.load(folder / "p1") as old, ns.Patch.load(folder / "p2") as new:
        assert old.tensors == new.tensors
        assert (old.neurons, old.parameters, old.reversible, old.base, old.facts) == (
            new.neurons, new.parameters, new.reversible, new.base, new.facts
        )  # fmt: skip
        for name in new.tensors:
            for read in ("index", "values", "base_values", "base_digests"):
                found, expected = (getattr(patch, read)(name) for patch in (old, new))
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                np.testing.assert_array_equal(found, expected)
    one, two = (ns.inspect(folder / f"p{n}") for n in (1, 2))
    differing = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert differing == {"name", "version", "bytes", "sha256"}
    assert ns.inspect([folder / "p1", folder / "q2"])["overlaps"][0]["agree"]


VERBS: dict[str, Callable[[Path, str], object]] = {
    "apply": lambda f, p: ns.apply(f / "base", f / p, out=f / "out"),
    "apply, two": lambda f, p: ns.apply(f / "base", [f / p, f / "q1"], out=f / "out"),
    "export": lambda f, p: ns.export_lora(f / p, f / "out"),
    "export with the base": lambda f, p: ns.export_lora(f / p, f / "out", base=f / "base"),
    "revert": lambda f, p: [
        ns.apply(f / "base", f / "p2", in_place=True),
        ns.revert(f / "base", f / p, out=f / "out"),
    ],
    "in place and back": lambda f, p: [
        ns.apply(f / "base", f / p, in_place=True),
        (f / "base").rename(f / "out"),
        ns.verify(f / "out", f / p).holds("patched"),
        ns.revert(f / "out", f / p, in_place=True),
    ],
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_verb_makes_the_same_of_both(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, verb: Callable[[Path, str], object]
) -> None:
    found = []
    for name in ("p1", "p2"):
        root = tmp_path_factory.mktemp(name)
        for path in folder.rglob("*"):
            target = root / path.relative_to(folder)
            target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
        verb(root, name)
        found.append(snapshot(root / "out"))
    assert found[0] == found[1]
    assert len(found[0]) > 2


@pytest.mark.parametrize("policy", ["first", "mean", "sum", "ties"])
def test_they_are_merged_with_others(folder: Path, policy: str) -> None:
    for one, other in (("p1", "q1"), ("p1", "q2"), ("p2", "q2")):
        out = folder / f"{one}{other}"
        with ns.merge([folder / one, folder / other], on_overlap=policy, out=out) as merged:
            assert merged.manifest["version"] == 2
            merged.check()
        assert_same_tensors(patch_rows(out), patch_rows(folder / "p1q1"))


def test_they_are_attached_and_put_into_live_models(folder: Path) -> None:
    def model() -> torch.nn.Sequential:
        from safetensors.torch import load_file

        made = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 4, bias=False))
        files = sorted((folder / "base").glob("*.safetensors"))
        made.load_state_dict({name: value for file in files for name, value in load_file(file).items()})
        return made

    def state(made: torch.nn.Module) -> dict[str, bytes]:
        return {name: value.numpy().tobytes() for name, value in copy.deepcopy(made.state_dict()).items()}

    found = []
    for name in ("p1", "p2"):
        live = model()
        before = state(live)
        ns.apply_live(live, folder / name)
        found.append(state(live))
        attached = ns.attach(model(), folder / name, base=folder / "base")
        attached.detach()
    assert found[0] == found[1] != before
