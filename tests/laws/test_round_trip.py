"""The laws of patches: apply puts in what extract cut out, and revert takes it out again, bit for bit.

Every law holds for random checkpoints: names, shapes, element types, shards, neuron axes. The oracle is numpy
on bits, written from the format's specification (`conftest.patched_by_hand`).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BITS,
    LLAMA_CONFIG,
    assert_same_tensors,
    patched_by_hand,
    raw_folder,
    raw_read,
    snapshot,
    vectors_of,
    with_vectors,
)

import neftsurgery as ns
from neftsurgery.selection.selection import Chosen

Bits = dict[str, tuple[str, np.ndarray]]

law = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))

NAMES = [
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.10.attn.c_attn.weight",
    "a:index",
    "../../etc/passwd",
    "gewicht ⚖ [0]*",
    "z",
]


@dataclass
class Case:
    """The tensors of two checkpoints, and their neuron axes."""

    base: Bits
    tuned: Bits
    shards: tuple[int, int, int]
    axis: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def options(self) -> dict[str, object]:
        return {"axis": [(glob(name), axes) for name, axes in self.axis.items()], "include": ["*"]}


def glob(name: str) -> str:
    """A pattern that matches ``name`` only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base: Bits = {}
    axis = {}
    for name in names:
        kind = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        base[name] = kind, bits(rng, kind, shape)
        if len(shape) > 1:
            axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape)))
            axis[name] = tuple(sorted(axes))
        if name.endswith(".weight") and draw(st.booleans()):
            size = [shape[a] for a in axis.get(name, (0,))]
            base[name.replace(".weight", ".bias")] = kind, bits(rng, kind, size)
    share = draw(st.sampled_from([0.01, 0.2, 1.0]))
    tuned = {name: (kind, altered(rng, old, share)) for name, (kind, old) in base.items()}
    if all(np.array_equal(base[name][1], tuned[name][1]) for name in base):
        tuned = {name: (kind, old ^ old.dtype.type(1)) for name, (kind, old) in base.items()}
    shards = tuple(min(len(base), draw(st.integers(1, 4))) for _ in range(3))
    return Case(base, tuned, shards, axis)


def bits(rng: np.random.Generator, kind: str, shape: list[int]) -> np.ndarray:
    return rng.integers(0, 256, (*shape, int(BITS[kind][1])), np.uint8).view(BITS[kind])[..., 0]


def altered(rng: np.random.Generator, old: np.ndarray, share: float) -> np.ndarray:
    noise = bits(rng, {1: "F8_E4M3", 2: "F16", 4: "F32", 8: "F64"}[old.itemsize], list(old.shape))
    return np.where(rng.random(old.shape) < share, old ^ noise, old)


@contextmanager
def written(case: Case) -> Iterator[tuple[Path, Path, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        yield (
            root,
            raw_folder(root / "base", case.base, case.shards[0]),
            raw_folder(root / "tuned", case.tuned, case.shards[1]),
        )


def lossless(case: Case, base: Path, tuned: Path, out: Path, **options: object) -> ns.Patch:
    return ns.extract(base, tuned, changed=True, with_bias=True, out=out, **(case.options() | options))


@law
@given(cases())
def test_a_lossless_patch_restores_the_tuned_bits(case: Case) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p")
        ns.apply(base, patch, out=root / "out")
        assert_same_tensors(raw_read(root / "out"), case.tuned)
        assert ns.verify(root / "out", patch).state == "patched"
        assert ns.verify(tuned, patch).state == "patched"
        assert ns.verify(base, patch).state == "base"


@law
@given(cases(), st.booleans())
def test_revert_gives_every_file_back_byte_for_byte(case: Case, reversible: bool) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p", reversible=reversible)
        before = snapshot(base)
        ns.apply(base, patch, out=root / "out")
        assert snapshot(root / "out") != before
        ns.revert(root / "out", patch, out=root / "back", base=None if reversible else base)
        assert snapshot(root / "back") == before
        assert snapshot(base) == before


@law
@given(cases())
def test_a_single_file_comes_back_byte_for_byte(case: Case) -> None:
    case.shards = (1, 1, 1)
    with written(case) as (root, base, tuned):
        file = base / "model.safetensors"
        patch = lossless(case, file, tuned, root / "p", reversible=True)
        ns.apply(file, patch, out=root / "out.safetensors")
        assert_same_tensors(raw_read(root / "out.safetensors"), case.tuned)
        ns.revert(root / "out.safetensors", patch, out=root / "back.safetensors")
        assert (root / "back.safetensors").read_bytes() == file.read_bytes()


@law
@given(cases())
def test_a_patch_fits_any_shard_layout(case: Case) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p")
        other = raw_folder(root / "other", dict(reversed(case.base.items())), case.shards[2])
        ns.apply(other, patch, out=root / "out")
        assert_same_tensors(raw_read(root / "out"), case.tuned)
        names = {path.name for path in other.iterdir()}
        assert {path.name for path in (root / "out").iterdir()} == names


@law
@given(cases(), st.data())
def test_a_part_of_the_neurons_is_exactly_that_part(case: Case, data: st.DataObject) -> None:
    """With any selection, touched vectors become the tuned ones, and no other bit changes."""
    with written(case) as (root, base, tuned):
        whole = lossless(case, base, tuned, root / "whole")
        patch = ns.extract(
            base, tuned, some_of(whole, data), out=root / "p", reversible=data.draw(st.booleans())
        )
        ns.apply(base, patch, out=root / "out")
        expected = patched_by_hand(case.base, root / "p")
        assert_same_tensors(raw_read(root / "out"), expected)
        for name, tensor in patch.tensors.items():
            found, wanted = (vectors_of(t[name][1], tensor.layout.axes) for t in (expected, case.tuned))
            np.testing.assert_array_equal(found[patch.index(name)], wanted[patch.index(name)])
        ns.revert(root / "out", patch, out=root / "back", base=base)
        assert snapshot(root / "back") == snapshot(base)


def some_of(patch: ns.Patch, data: st.DataObject) -> ns.Selection:
    """A random part of what a patch replaces, at least one neuron."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = {}
    for name, tensor in patch.tensors.items():
        kept = patch.index(name)[rng.random(tensor.count) < 0.5]
        if len(kept):
            chosen[name] = Chosen(tensor.info, tensor.layout, kept)
    if not chosen:
        name, tensor = next(iter(patch.tensors.items()))
        chosen[name] = Chosen(tensor.info, tensor.layout, patch.index(name)[:1])
    return ns.Selection(chosen, {})


@law
@given(cases())
def test_apply_twice_is_apply_once(case: Case) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p")
        ns.apply(base, patch, out=root / "once")
        ns.apply(root / "once", patch, out=root / "twice")
        ns.apply(base, [patch, patch], out=root / "both")
        assert snapshot(root / "once") == snapshot(root / "twice") == snapshot(root / "both")
        ns.revert(base, patch, out=root / "back", base=base)
        assert snapshot(root / "back") == snapshot(base)


@law
@given(cases(), st.data())
def test_a_half_patched_checkpoint_is_completed_or_reverted(case: Case, data: st.DataObject) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p", reversible=True)
        half = ns.extract(base, tuned, some_of(patch, data), out=root / "half")
        mixed = raw_folder(root / "mixed", patched_by_hand(case.base, root / "half"), case.shards[2])
        found = ns.verify(mixed, patch)
        done = half.neurons == sum(tensor.count for tensor in patch.tensors.values())
        assert found.state == ("patched" if done else "mixed")
        for name, tensor in found.tensors.items():
            count = half.tensors[name].count if name in half.tensors else 0
            assert (tensor.patched, tensor.base) == (count, patch.tensors[name].count - count)
            assert tensor.neither == tensor.both == 0
        ns.apply(mixed, patch, out=root / "out")
        assert_same_tensors(raw_read(root / "out"), case.tuned)
        ns.revert(mixed, patch, out=root / "back")
        assert_same_tensors(raw_read(root / "back"), case.base)


@law
@given(cases(), st.data())
def test_a_foreign_vector_is_found_and_refused(case: Case, data: st.DataObject) -> None:
    with written(case) as (root, base, tuned):
        patch = lossless(case, base, tuned, root / "p", reversible=True)
        name = data.draw(st.sampled_from(sorted(patch.tensors)))
        tensor = patch.tensors[name]
        kind, old = case.base[name]
        victim = patch.index(name)[data.draw(st.integers(0, tensor.count - 1))]
        vector = vectors_of(old, tensor.layout.axes)[victim]
        new = vectors_of(case.tuned[name][1], tensor.layout.axes)[victim]
        third = next(v for v in (vector ^ vector.dtype.type(n) for n in (1, 2)) if not np.array_equal(v, new))
        damaged = case.base | {name: (kind, with_vectors(old, tensor.layout.axes, np.array([victim]), third))}
        other = raw_folder(root / "other", damaged, case.shards[2])
        found = ns.verify(other, patch)
        assert found.state == "neither"
        assert found.tensors[name].neither == 1
        assert {n for n, t in found.tensors.items() if t.state != "base"} == {name}
        for verb in (ns.apply, ns.revert):
            with pytest.raises(ns.MismatchError, match="another base"):
                verb(other, patch, out=root / "out")
        assert not (root / "out").exists()


@law
@given(cases(), st.integers(2, 3), st.integers(0, 2**32))
def test_disjoint_patches_commute(case: Case, parts: int, seed: int) -> None:
    with written(case) as (root, base, tuned):
        whole = lossless(case, base, tuned, root / "whole")
        rng = np.random.default_rng(seed)
        dealt = {name: rng.integers(0, parts, tensor.count) for name, tensor in whole.tensors.items()}
        patches = []
        for part in range(parts):
            chosen = {
                name: Chosen(tensor.info, tensor.layout, whole.index(name)[dealt[name] == part])
                for name, tensor in whole.tensors.items()
                if (dealt[name] == part).any()
            }
            if chosen:
                patches.append(ns.extract(base, tuned, ns.Selection(chosen, {}), out=root / f"p{part}"))
        ns.apply(base, whole, out=root / "out")
        for number, order in enumerate(itertools.permutations(patches)):
            ns.apply(base, order, out=root / f"out{number}")
            assert snapshot(root / f"out{number}") == snapshot(root / "out")


@st.composite
def chains(draw: st.DrawFn) -> tuple[Case, list[tuple[Bits, dict[str, tuple[int, ...]]]]]:
    """A case, and two more states after its tuned one, each with its own neuron axes."""
    case = draw(cases())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.02, 0.5]))
    steps, last = [], case.tuned
    for _ in range(2):
        last = {name: (kind, altered(rng, old, share)) for name, (kind, old) in last.items()}
        axis = {}
        for name, axes in case.axis.items():
            rank = last[name][1].ndim
            axis[name] = draw(st.sampled_from([axes, (0,), (rank - 1,)]))
        steps.append((last, axis))
    return case, steps


@law
@given(chains(), st.data())
def test_overlapping_patches_apply_in_order(
    chain: tuple[Case, list[tuple[Bits, dict[str, tuple[int, ...]]]]], data: st.DataObject
) -> None:
    """Each patch is checked against the result of the earlier ones, also where rows and columns cross."""
    case, steps = chain
    with written(case) as (root, base, _):
        state, here = case.base, base
        patches: list[ns.Patch] = []
        for number, (target, axis) in enumerate([(case.tuned, case.axis), *steps]):
            there = raw_folder(root / f"target{number}", target)
            step = Case(state, target, case.shards, axis)
            if all(np.array_equal(state[name][1], target[name][1]) for name in state):
                continue
            whole = lossless(step, here, there, root / f"whole{number}")
            patches.append(ns.extract(here, there, some_of(whole, data), out=root / f"p{number}"))
            state = patched_by_hand(state, root / f"p{number}")
            ns.apply(here, patches[-1], out=root / f"state{number}")
            here = root / f"state{number}"
            assert_same_tensors(raw_read(here), state)
        ns.apply(base, patches, out=root / "out")
        assert snapshot(root / "out") == snapshot(here)
        # What is already there is accepted, too: all of them, or the first few.
        for start in (*(root.glob("state?")), root / "out"):
            ns.apply(start, patches, out=root / "again", force=True)
            assert snapshot(root / "again") == snapshot(root / "out")


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("anatomy", ["rows", "ffn", "units"])
@pytest.mark.parametrize(
    "budget",
    [
        {"neurons": "10%"},
        {"neurons": 7, "policy": "reversed"},
        {"params": "5%", "policy": "random", "seed": 3},
        {"threshold": 1e-5},
        {"changed": True},
    ],
    ids=lambda budget: next(iter(budget)),
)
def test_every_anatomy_and_budget_makes_a_patch_of_the_tuned_vectors(
    tmp_path: Path, llama_arrays: object, anatomy: str, budget: dict[str, object], kind: str
) -> None:
    arrays = llama_arrays()  # type: ignore[operator]
    rng = np.random.default_rng(1)
    base, tuned = {}, {}
    for name, array in arrays.items():
        wide = array.view(np.uint32)
        narrow = {"F32": wide, "BF16": (wide >> 16).astype(np.uint16), "F16": array.astype("f2").view("u2")}
        base[name] = kind, narrow[kind]
        step = rng.integers(0, 2, array.shape) << (23 if kind == "F32" else 7)
        tuned[name] = kind, narrow[kind] ^ step.astype(narrow[kind].dtype)
    first = raw_folder(tmp_path / "base", base, 2, LLAMA_CONFIG)
    second = raw_folder(tmp_path / "tuned", tuned, 3, LLAMA_CONFIG)
    patch = ns.extract(first, second, anatomy=anatomy, out=tmp_path / "p", reversible=True, **budget)
    assert patch.neurons > 0
    ns.apply(first, patch, out=tmp_path / "out")
    expected = patched_by_hand(base, tmp_path / "p")
    assert_same_tensors(raw_read(tmp_path / "out"), expected)
    for name, tensor in patch.tensors.items():
        found, wanted = (vectors_of(t[name][1], tensor.layout.axes) for t in (expected, tuned))
        np.testing.assert_array_equal(found[patch.index(name)], wanted[patch.index(name)])
    ns.revert(tmp_path / "out", patch, out=tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(first)
