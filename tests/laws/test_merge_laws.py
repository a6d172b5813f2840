"""The laws of merging, over random checkpoints and patches. Oracles: numpy and torch on whole tensors."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import (
    assert_same_tensors,
    patch_rows,
    patched_by_hand,
    raw_folder,
    raw_read,
    snapshot,
    vectors_of,
)
from test_round_trip import Bits, Case, cases, lossless, some_of, written

import neftsurgery as ns
from neftsurgery.selection.selection import Chosen

law = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))

TORCH = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


def without_story(patch: ns.Patch) -> tuple[object, dict[str, bytes]]:
    """What a patch does, without how it was made."""
    entries = patch_rows(patch.path)
    return patch.manifest["tensors"], {name: bits.tobytes() for name, (_, bits) in entries.items()}


def dealt(whole: ns.Patch, parts: int, seed: int) -> list[ns.Selection]:
    """The neurons of a patch split into ``parts`` selections, without empty ones."""
    rng = np.random.default_rng(seed)
    owner = {name: rng.integers(0, parts, tensor.count) for name, tensor in whole.tensors.items()}
    selections = []
    for part in range(parts):
        chosen = {
            name: Chosen(tensor.info, tensor.layout, whole.index(name)[owner[name] == part])
            for name, tensor in whole.tensors.items()
            if (owner[name] == part).any()
        }
        if chosen:
            selections.append(ns.Selection(chosen, {}))
    return selections


@law
@given(cases(), st.integers(2, 3), st.integers(0, 2**32), st.sampled_from(["error", "mean", "ties", "first"]))
def test_disjoint_patches_commute_and_merge_to_what_applying_all_gives(
    case: Case, parts: int, seed: int, policy: str
) -> None:
    with written(case) as (root, base, tuned):
        whole = lossless(case, base, tuned, root / "whole", reversible=True)
        patches = [
            ns.extract(base, tuned, selection, out=root / f"p{n}", reversible=True)
            for n, selection in enumerate(dealt(whole, parts, seed))
        ]
        ns.apply(base, patches, out=root / "all")
        for number, order in enumerate(itertools.permutations(patches)):
            merged = ns.merge(order, on_overlap=policy, out=root / f"m{number}")
            merged.check()
            assert without_story(merged) == without_story(whole)
            ns.apply(base, merged, out=root / f"out{number}")
            assert snapshot(root / f"out{number}") == snapshot(root / "all")


@law
@given(cases(), st.booleans(), st.data())
def test_any_merge_of_one_patch_is_the_patch(case: Case, reversible: bool, data: st.DataObject) -> None:
    with written(case) as (root, base, tuned):
        whole = lossless(case, base, tuned, root / "whole")
        patch = ns.extract(base, tuned, some_of(whole, data), out=root / "p", reversible=reversible)
        for policy in ("sum", "mean", "ties", "error"):
            merged = ns.merge([patch], on_overlap=policy, base=data.draw(st.sampled_from([None, base])))
            merged.save(root / policy)
            assert (root / policy).read_bytes() == (root / "p").read_bytes()


@law
@given(cases(), st.sampled_from(["first", "last"]), st.booleans(), st.data())
def test_revert_after_applying_a_merge_is_the_identity(
    case: Case, policy: str, reversible: bool, data: st.DataObject
) -> None:
    with written(case) as (root, base, tuned):
        whole = lossless(case, base, tuned, root / "whole")
        one = ns.extract(base, tuned, some_of(whole, data), out=root / "p", reversible=reversible)
        merged = ns.merge([one, whole], on_overlap=policy, base=base, reversible=True, out=root / "m")
        assert merged.reversible
        ns.apply(base, merged, out=root / "out")
        assert_same_tensors(raw_read(root / "out"), case.tuned)
        ns.revert(root / "out", merged, out=root / "back")
        assert snapshot(root / "back") == snapshot(base)
        plain = ns.merge([one, whole], on_overlap=policy, out=root / "plain")
        assert not plain.reversible
        ns.revert(root / "out", plain, base=base, out=root / "again")
        assert snapshot(root / "again") == snapshot(base)


@law
@given(cases(), st.data())
def test_patches_of_different_bases_are_refused(case: Case, data: st.DataObject) -> None:
    with written(case) as (root, base, tuned):
        mine = lossless(case, base, tuned, root / "mine")
        # The same tuned model over another base: every shared neuron was something else there.
        there = raw_folder(root / "there", {name: (kind, ~bits) for name, (kind, bits) in case.base.items()})
        theirs = lossless(case, there, tuned, root / "theirs")
        before = snapshot(root)
        for policy in ("error", "first", "mean"):
            with pytest.raises(ns.MismatchError, match="different bases"):
                ns.merge([mine, theirs], on_overlap=policy, out=root / "m")
        assert snapshot(root) == before


@law
@given(cases(), st.integers(0, 2**32))
def test_disjoint_patches_of_different_bases_are_refused_by_fingerprint(case: Case, seed: int) -> None:
    """Without a common neuron there is no digest to compare, so the manifests decide."""
    with written(case) as (root, base, tuned):
        chosen = dealt(lossless(case, base, tuned, root / "whole"), 2, seed)
        assume(len(chosen) == 2)
        there = raw_folder(root / "there", {name: (kind, ~bits) for name, (kind, bits) in case.base.items()})
        mine = ns.extract(base, tuned, chosen[0], out=root / "mine")
        theirs = ns.extract(there, tuned, chosen[1], out=root / "theirs")
        before = snapshot(root)
        for policy in ("error", "first", "mean"):
            with pytest.raises(ns.MismatchError, match="different bases"):
                ns.merge([mine, theirs], on_overlap=policy, out=root / "m")
        assert snapshot(root) == before


@dataclass
class Clients:
    """A base, and different models of several clients."""

    kind: str
    base: Bits
    tuned: list[Bits]
    axis: dict[str, tuple[int, ...]]
    seed: int


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Raw elements converted to float64 by torch."""
    wide = torch.from_numpy(np.ascontiguousarray(bits).view(f"i{bits.itemsize}")).view(TORCH[kind])
    return wide.to(torch.float64).numpy()


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """Float64 rounded to the nearest element; bfloat16 from two neighbours, since torch rounds twice."""
    near = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[kind])
    if kind == "BF16":
        codes = near.view(torch.int16).numpy()
        options = np.stack([codes - 1, codes, codes + 1]).astype(np.int16)
        wide = torch.from_numpy(options).view(torch.bfloat16).to(torch.float64).numpy()
        far = np.abs(wide - values)
        far[np.isnan(far)] = np.inf
        even = options % 2 == 0
        best = np.lexsort((~even, far), axis=0)[0]
        return np.take_along_axis(options, best[None], axis=0)[0].view("u2")
    return (
        near.view({4: torch.int32, 8: torch.int64, 2: torch.int16}[near.element_size()])
        .numpy()
        .view(f"u{near.element_size()}")
    )


@st.composite
def clients(draw: st.DrawFn) -> Clients:
    kind = draw(st.sampled_from(list(TORCH)))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (9, 6), "b.weight": (5, 12), "c.weight": (3, 4, 5)}
    axis = {"a.weight": (0,), "b.weight": (1,), "c.weight": draw(st.sampled_from([(0, 1), (0, 2)]))}
    base = {name: (kind, rounded(rng.standard_normal(shape), kind)) for name, shape in shapes.items()}
    tuned = []
    for _ in range(draw(st.integers(2, 4))):
        step = draw(st.sampled_from([1e-3, 0.3]))
        tuned.append(
            {
                name: (kind, rounded(numbers(bits, kind) + step * rng.standard_normal(bits.shape), kind))
                for name, (_, bits) in base.items()
            }
        )
    return Clients(kind, base, tuned, axis, seed)


@contextmanager
def cut(some: Clients, reversible: bool) -> Iterator[tuple[Path, Path, list[ns.Patch]]]:
    """The base as a folder, and for each client a patch of about half its neurons."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = raw_folder(root / "base", some.base, 2)
        patches = []
        for n, tuned in enumerate(some.tuned):
            there = raw_folder(root / f"tuned{n}", tuned)
            options = {"neurons": "60%", "policy": "random", "seed": n, "axis": some.axis, "score": "l2"}
            patches.append(ns.extract(base, there, out=root / f"p{n}", reversible=reversible, **options))
        yield root, base, patches


def by_hand(
    some: Clients, patches: Sequence[ns.Patch], policy: str, weights: Sequence[float], density: float
) -> Bits:
    """The merged model on whole tensors. NaN marks what a patch does not touch."""
    result: Bits = {}
    moved: dict[str, list[np.ndarray]] = {}
    shared = {}
    for name, (kind, bits) in some.base.items():
        a = vectors_of(numbers(bits, kind), some.axis[name])
        values = []
        for patch, tuned in zip(patches, some.tuned, strict=True):
            full = np.full(a.shape, np.nan)
            if name in patch.tensors:
                index = patch.index(name)
                full[index] = vectors_of(numbers(tuned[name][1], kind), some.axis[name])[index]
            values.append(full)
        moved[name] = [v - a for v in values]
        shared[name] = sum(~np.isnan(v[:, 0]) for v in values) > 1
    least = []
    for n in range(len(patches)):
        every = np.concatenate([np.abs(d[n][shared[name]]).ravel() for name, d in moved.items()])
        every = np.sort(every[~np.isnan(every)].astype(np.float32))[::-1]
        least.append(every[max(1, round(density * len(every))) - 1] if len(every) else 0)
    for name, (kind, bits) in some.base.items():
        a = vectors_of(numbers(bits, kind), some.axis[name])
        new = a.copy()
        for row in range(len(a)):
            held = [
                (w, d[row], t)
                for w, d, t in zip(weights, moved[name], least, strict=True)
                if not np.isnan(d[row, 0])
            ]
            if policy == "sum":
                new[row] += sum(w * d for w, d, _ in held)
            elif policy == "mean" and held:
                new[row] = sum(w * (a[row] + d) for w, d, _ in held) / sum(w for w, *_ in held)
            elif len(held) == 1:
                new[row] += held[0][1]
            elif held:
                for column in range(a.shape[1]):
                    kept = [(w, d[column]) for w, d, t in held if np.float32(abs(d[column])) >= t]
                    sign = np.sign(sum(w * d for w, d in kept))
                    agreeing = [(w, d) for w, d in kept if np.sign(d) == sign != 0]
                    if agreeing:
                        new[row, column] += sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing)
        order = [*some.axis[name], *(x for x in range(bits.ndim) if x not in some.axis[name])]
        back = new.reshape([bits.shape[x] for x in order]).transpose(np.argsort(order))
        result[name] = kind, rounded(np.ascontiguousarray(back), kind)
    return result


@law
@given(clients(), st.sampled_from(["mean", "sum", "ties"]), st.booleans(), st.booleans(), st.data())
def test_merging_equals_arithmetic_on_whole_tensors_rounded_once(
    some: Clients, policy: str, weighted: bool, reversible: bool, data: st.DataObject
) -> None:
    with cut(some, reversible) as (root, base, patches):
        rng = np.random.default_rng(some.seed)
        weights = rng.uniform(0.2, 2, len(patches)) if weighted else np.ones(len(patches))
        density = data.draw(st.sampled_from([0.2, 0.5, 1.0])) if policy == "ties" else 0.2
        merged = ns.merge(
            patches,
            on_overlap=policy,
            weights=weights.tolist() if weighted else None,
            density=density if policy == "ties" else None,
            base=None if reversible else base,
            out=root / "m",
        )
        merged.check()
        assert merged.reversible == reversible
        expected = by_hand(some, patches, policy, weights, density)
        for name, tensor in merged.tensors.items():
            found = patched_by_hand(some.base, root / "m")[name][1]
            gap = np.abs(numbers(found, some.kind) - numbers(expected[name][1], some.kind))
            # Only the order of float64 sums may differ: a tie of rounding, or F64 itself.
            slack = 1e-14 if some.kind == "F64" else 0.0
            assert (gap > slack * np.abs(numbers(expected[name][1], some.kind)).max()).mean() <= 0.002, name
            union = np.unique(np.concatenate([p.index(name) for p in patches if name in p.tensors]))
            np.testing.assert_array_equal(merged.index(name), union)
            assert tensor.layout.axes == some.axis[name]
        ns.apply(base, merged, out=root / "out")
        ns.revert(root / "out", merged, base=base, out=root / "back")
        assert snapshot(root / "back") == snapshot(base)


@law
@given(clients(), st.booleans())
def test_the_mean_of_equal_patches_is_the_patch(some: Clients, reversible: bool) -> None:
    with cut(some, reversible) as (_, __, patches):
        merged = ns.merge([patches[0], patches[0], patches[0]], on_overlap="mean")
        for name in patches[0].tensors:
            np.testing.assert_array_equal(merged.values(name), patches[0].values(name))
            np.testing.assert_array_equal(merged.base_digests(name), patches[0].base_digests(name))
