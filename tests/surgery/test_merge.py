"""Merging patches: what is refused, what is said, and that blocks and threads change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import LLAMA_CONFIG, Result, raw_file, snapshot, with_facts, write_file, write_folder

import neftsurgery as ns
from neftsurgery.storage.threads import DEFAULT_MEMORY, Limits
from neftsurgery.surgery.merge import plan_merge

Neft = Callable[..., Result]


@pytest.fixture
def patches(pair: tuple[Path, Path], tmp_path: Path) -> list[Path]:
    """Three overlapping patches of `pair`, the last one reversible."""
    for number in range(3):
        ns.extract(
            *pair,
            neurons="40%",
            policy="random",
            seed=number,
            reversible=number == 2,
            out=tmp_path / f"p{number}",
        )
    return [tmp_path / f"p{number}" for number in range(3)]


def without_fingerprint(path: Path, out: Path) -> Path:
    """The same patch, by someone who did not have the files of its base."""
    return with_facts(path, out, base={"name": "somewhere"})


def test_overlapping_patches_of_one_tuned_model(
    pair: tuple[Path, Path], patches: list[Path], tmp_path: Path
) -> None:
    base, _ = pair
    ns.apply(base, patches, out=tmp_path / "all")
    for policy in ("first", "last", "mean"):
        merged = ns.merge(patches, on_overlap=policy, out=tmp_path / policy)
        ns.apply(base, merged, out=tmp_path / f"{policy}.out")
        assert snapshot(tmp_path / f"{policy}.out") == snapshot(tmp_path / "all")
    story = merged.facts["merged"]
    assert (story["on_overlap"], story["weights"]) == ("mean", [1, 1, 1])
    assert [one["name"] for one in story["patches"]] == ["p0", "p1", "p2"]
    assert merged.base == ns.Patch.load(patches[0]).base
    assert merged.facts["anatomy"] == "rows"
    assert str(tmp_path) not in json.dumps(merged.manifest)
    with pytest.raises(ns.MismatchError, match=r"(?s)p0 and .*p[12] overlap.*with on_overlap: first"):
        ns.merge(patches)


def test_blocks_and_threads_change_nothing(
    pair: tuple[Path, Path], patches: list[Path], tmp_path: Path
) -> None:
    options = {"on_overlap": "ties", "density": 0.3, "weights": [1, 2, 0.5], "base": pair[0]}
    ns.merge(patches, **options, reversible=True, out=tmp_path / "large")
    for threads in (1, 3):
        plan = plan_merge(patches, **options, reversible=True, out=tmp_path / f"small{threads}")
        plan.run(limits=Limits(threads, DEFAULT_MEMORY, block=300))
        assert (tmp_path / f"small{threads}").read_bytes() == (tmp_path / "large").read_bytes()


def test_a_patch_given_twice_sums_to_twice_its_step(pair: tuple[Path, Path], tmp_path: Path) -> None:
    patch = ns.extract(*pair, neurons=20, reversible=True, out=tmp_path / "p")
    twice = ns.merge([patch, patch], on_overlap="sum", out=tmp_path / "twice")
    undone = ns.merge([patch, patch], on_overlap="sum", weights=[1, -1], out=tmp_path / "none")
    for name in patch.tensors:
        old, new = patch.base_values(name).view("f4"), patch.values(name).view("f4")
        np.testing.assert_allclose(twice.values(name).view("f4") - old, 2 * (new - old), rtol=1e-3, atol=1e-8)
        np.testing.assert_array_equal(undone.values(name), patch.base_values(name))
    assert ns.verify(pair[0], undone).state == "patched"  # as good as the base


def test_a_weight_scales_what_one_patch_alone_replaces(pair: tuple[Path, Path], tmp_path: Path) -> None:
    patch = ns.extract(*pair, neurons=20, reversible=True, out=tmp_path / "p")
    half = ns.merge([patch], on_overlap="sum", weights=[0.5], out=tmp_path / "half")
    for name in patch.tensors:
        old, new = patch.base_values(name).view("f4"), patch.values(name).view("f4")
        np.testing.assert_allclose(half.values(name).view("f4"), old + (new - old) / 2, rtol=1e-6)
    ns.extract(*pair, neurons=20, out=tmp_path / "q")
    with pytest.raises(ns.UsageError, match=r"base=\.\.\."):
        ns.merge([tmp_path / "q"], on_overlap="sum", weights=[0.5])


def test_federated_averaging(tmp_path: Path, llama_arrays: Callable[..., dict[str, np.ndarray]]) -> None:
    """The mean of clients' patches, weighted by their examples, is the mean of their models."""
    base = llama_arrays()
    folder = write_folder(tmp_path / "base", base, 2, LLAMA_CONFIG)
    rng = np.random.default_rng(0)
    selection, models, clients = None, [], []
    for number in range(3):
        model = {
            name: (array + 1e-2 * rng.standard_normal(array.shape)).astype(np.float32)
            if array.ndim > 1
            else array
            for name, array in base.items()
        }
        there = write_folder(tmp_path / f"client{number}", model, 1, LLAMA_CONFIG)
        chosen = {"neurons": "10%"} if selection is None else {}
        clients.append(ns.extract(folder, there, selection, out=tmp_path / f"p{number}", **chosen))
        selection = clients[0].selection
        models.append(model)
    examples = [120, 80, 310]
    merged = ns.merge(clients, on_overlap="mean", weights=examples, out=tmp_path / "round")
    ns.apply(folder, merged, out=tmp_path / "next")
    found = {k: v for file in (tmp_path / "next").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, tensor in merged.tensors.items():
        index = merged.index(name)
        expected = sum(n * m[name].astype(np.float64) for n, m in zip(examples, models, strict=True)) / 510
        if tensor.layout.axes == (0,):
            np.testing.assert_array_equal(found[name][index], expected[index].astype(np.float32))


def test_reversible_if_every_patch_is_or_if_asked(
    pair: tuple[Path, Path], patches: list[Path], tmp_path: Path
) -> None:
    assert not ns.merge(patches, on_overlap="last").reversible
    assert ns.merge(patches, on_overlap="last", reversible=True, base=pair[0]).reversible
    assert not ns.merge(patches, on_overlap="last", base=pair[0]).reversible
    assert ns.merge([patches[2], patches[2]], on_overlap="last").reversible
    assert not ns.merge([patches[2], patches[2]], on_overlap="last", reversible=False).reversible
    with pytest.raises(ns.UsageError, match=r"p0: a reversible patch needs the values.*"):
        ns.merge(patches, on_overlap="last", reversible=True)
    for policy in ("sum", "ties"):
        with pytest.raises(ns.UsageError, match=f"on_overlap='{policy}' needs the values"):
            ns.merge(patches, on_overlap=policy)
        # Each shared neuron's base is in one patch that holds it: that is enough.
        ns.merge([patches[0], patches[2]], on_overlap=policy).check()


def test_a_base_that_is_not_theirs(pair: tuple[Path, Path], patches: list[Path], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for policy in ("mean", "ties"):
        with pytest.raises(ns.MismatchError, match="not the base that the patches were made from"):
            ns.merge(patches, on_overlap=policy, base=pair[1], out=tmp_path / "m")
    assert snapshot(tmp_path) == before


def test_unknown_bases_are_warned_of_and_shared_neurons_compared(
    pair: tuple[Path, Path], tmp_path: Path, neft: Neft
) -> None:
    base, tuned = pair
    ns.extract(base, tuned, neurons="50%", out=tmp_path / "p")
    ns.extract(tuned, base, neurons="50%", out=tmp_path / "q")
    known, foreign = (without_fingerprint(tmp_path / n, tmp_path / f"{n}.anon") for n in ("p", "q"))
    same = neft("merge", "p", known, "-o", "m", "--on-overlap", "mean")
    assert same.code == 0
    assert "p.anon was made from is not known" in same.err
    assert neft("merge", "p", known, "-o", "m", "--on-overlap", "mean", "--base", base, "--force").err == ""
    assert neft("merge", "p", "q", "-o", "n", "--on-overlap", "mean").code == 3
    found = neft("merge", known, foreign, "-o", "n", "--on-overlap", "mean", "--json")
    assert found.code == 3
    assert "different bases" in found.json["error"]
    assert not (tmp_path / "n").exists()


def test_rows_and_columns_of_one_tensor_do_not_merge(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [write_file(tmp_path / n, {"w": rng.standard_normal((6, 6)).astype("f4")}) for n in ("a", "b")]
    rows, columns = (
        ns.extract(*sides, neurons=2, axis={"w": axis}, out=tmp_path / f"p{axis}") for axis in (0, 1)
    )
    with pytest.raises(ns.MismatchError, match=r"(?s)different axes.*neftsurgery apply"):
        ns.merge([rows, columns], on_overlap="last")


def test_other_models_and_types_without_arithmetic(tmp_path: Path) -> None:
    bits = np.arange(24, dtype="u4").reshape(6, 4)

    def patch(name: str, kind: str, array: np.ndarray) -> ns.Patch:
        sides = [
            raw_file(tmp_path / f"{name}{n}", {"w": (kind, array ^ array.dtype.type(n))}) for n in (0, 1)
        ]
        return ns.extract(*sides, changed=True, include=["*"], reversible=True, out=tmp_path / f"{name}.p")

    one, other = patch("a", "F32", bits), patch("b", "F32", bits[:5].copy())
    with pytest.raises(ns.MismatchError, match=r"different (bases|models)"):
        ns.merge([one, other], on_overlap="last")
    anonymous = [without_fingerprint(tmp_path / f"{n}.p", tmp_path / f"{n}.q") for n in "ab"]
    with pytest.raises(ns.MismatchError, match="different models"):
        ns.merge(anonymous, on_overlap="last")


def test_damage_is_not_laundered(pair: tuple[Path, Path], patches: list[Path], tmp_path: Path) -> None:
    patch = ns.Patch.load(patches[0])
    name = next(iter(patch.tensors))
    data = bytearray(patches[0].read_bytes())
    data[data.index(patch.values(name, 0, 1).tobytes())] ^= 1
    patches[0].write_bytes(data)
    with pytest.raises(ns.CorruptFileError, match="patched_hash"):
        ns.merge(patches, on_overlap="first", out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--weights", "1,2"],
        ["--on-overlap", "mean", "--weights", "1"],
        ["--on-overlap", "mean", "--weights", "1,x"],
        ["--on-overlap", "mean", "--weights", "1,-1"],
        ["--on-overlap", "ties", "--weights", "1,0"],
        ["--on-overlap", "sum", "--weights", "1,nan"],
        ["--on-overlap", "mean", "--density", "0.5"],
        ["--on-overlap", "ties", "--density", "0"],
        ["--on-overlap", "median"],
        ["--on-overlap", "mean", "--base", "nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_command_lines(patches: list[Path], tmp_path: Path, neft: Neft, words: list[str]) -> None:
    result = neft("merge", "p0", "p1", "-o", "m", *words)
    assert result.code == 2, result.err
    assert not (tmp_path / "m").exists()


def test_the_command(pair: tuple[Path, Path], patches: list[Path], tmp_path: Path, neft: Neft) -> None:
    dry = neft("merge", "p0", "p1", "-o", "m", "--on-overlap", "mean", "--dry-run", "--json")
    assert dry.code == 0
    assert not (tmp_path / "m").exists()
    done = neft("merge", "p0", "p1", "-o", "m", "--on-overlap", "mean", "--json")
    assert done.json["neurons"] == dry.json["neurons"] == ns.Patch.load(tmp_path / "m").neurons
    assert 0 < done.json["shared"] < done.json["neurons"]
    assert done.json["bytes"] == (tmp_path / "m").stat().st_size
    assert done.json["bytes_read"] > 0
    assert neft("merge", "p0", "p1", "-o", "m", "--on-overlap", "mean").code == 2
    assert neft("merge", "p0", "p1", "-o", "p1", "--on-overlap", "mean", "--force").code == 2
    said = neft("merge", "p0", "p1", "-o", "m", "--on-overlap", "mean", "--force")
    assert "merged 2 patches" in said.out
    assert "wrote m" in said.out
    assert "merged" in neft("inspect", "m").out
    assert neft("verify", pair[1], "m", "--expect", "patched").code == 0


def test_inspect_shows_where_patches_overlap(
    pair: tuple[Path, Path], patches: list[Path], tmp_path: Path, neft: Neft
) -> None:
    facts = neft("inspect", *patches, "--json").json
    assert facts["kind"] == "patches"
    assert [one["name"] for one in facts["patches"]] == [str(path) for path in patches]
    assert [(o["first"], o["second"]) for o in facts["overlaps"]] == [(0, 1), (0, 2), (1, 2)]
    loaded = [ns.Patch.load(path) for path in patches]
    for found in facts["overlaps"]:
        a, b = loaded[found["first"]], loaded[found["second"]]
        common = a.tensors.keys() & b.tensors.keys()
        assert found["neurons"] == sum(len(np.intersect1d(a.index(n), b.index(n))) for n in common)
        assert found["tensors"] == sorted(common)
        assert (found["foreign"], found["agree"], found["same_base"]) == (0, True, True)
    said = neft("inspect", *patches)
    assert said.out.count("one base") == 3
    ns.extract(pair[1], pair[0], neurons="50%", out=tmp_path / "q")
    anonymous = without_fingerprint(tmp_path / "q", tmp_path / "anon")
    odd = neft("inspect", "p0", anonymous)
    assert "in common were not the same" in odd.out
    ns.extract(*pair, neurons="50%", axis={"*up_proj.weight": 1}, out=tmp_path / "columns")
    assert "rows and columns cross in 2 tensors" in neft("inspect", "p0", "columns").out
    assert neft("inspect", "p0", pair[0]).code == 2
    assert neft("inspect", "p0").code == 0
    assert ns.inspect([patches[0], patches[1]])["overlaps"] == facts["overlaps"][:1]
