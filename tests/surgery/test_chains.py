"""Lossless patches that follow each other: a run's checkpoints from one base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import raw_read, snapshot, write_folder

import neftsurgery as ns
from neftsurgery.tensors.header import read_header

STEPS = 5


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints ``0`` to ``4``, whose vocabulary, tensors and files change, and a patch for each step."""
    rng = np.random.default_rng(0)
    weight, table = rng.standard_normal((40, 30)), rng.standard_normal((50, 8))
    for step in range(STEPS):
        arrays = {"w": weight.astype(np.float16), "table": table.astype(np.float32)}
        if step in (2, 3):
            arrays["extra"] = np.full(7, step, np.int64)
        folder = write_folder(tmp_path / str(step), arrays, 1 + step % 2, {"step": step // 3})
        (folder / "vocab.txt").write_text("a b c" if step < 4 else "a b c d")
        weight = weight + 1e-3 * rng.standard_normal(weight.shape)
        table = np.concatenate([table, rng.standard_normal((3, 8))]) if step != 2 else table[:45]
    patches = tmp_path / "run"
    patches.mkdir()
    for step in range(1, STEPS):
        out = patches / f"step-{10 * step:03}.safetensors"
        ns.extract(tmp_path / str(step - 1), tmp_path / str(step), lossless=True, out=out).close()
    return patches


@pytest.mark.parametrize("start", range(STEPS))
def test_a_chain_leads_from_any_of_its_checkpoints_to_its_last(run: Path, tmp_path: Path, start: int) -> None:
    ns.apply(tmp_path / str(start), run, out=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "4")


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_chain_ends_where_asked(run: Path, tmp_path: Path, step: int) -> None:
    ns.apply(tmp_path / "0", run, to=10 * step, out=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / str(step))


def test_patches_named_one_by_one_are_a_chain(run: Path, tmp_path: Path, neft) -> None:
    paths = sorted(run.iterdir())
    assert neft("apply", "1", *paths[1:3], "-o", "out").code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "3")
    refused = neft("apply", "0", paths[0], paths[2], "-o", "x")
    assert (refused.code, "does not follow" in refused.err) == (3, True)
    assert not (tmp_path / "x").exists()


def test_a_chain_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ns.UsageError, match="no patch of the chain has the number 15"):
        ns.apply(tmp_path / "0", run, to=15, out=tmp_path / "x")
    with pytest.raises(ns.MismatchError, match="was made from another checkpoint"):
        ns.apply(tmp_path / "3", run, to=20, out=tmp_path / "x")
    (run / "step-020.safetensors").rename(tmp_path / "step-020.safetensors")
    with pytest.raises(ns.MismatchError, match="not one chain"):
        ns.apply(tmp_path / "0", run, out=tmp_path / "x")
    shutil.rmtree(run)
    run.mkdir()
    with pytest.raises(ns.UsageError, match="found a folder"):
        ns.apply(tmp_path / "0", run, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_link_is_noticed(run: Path, tmp_path: Path) -> None:
    """The last byte is code of the last tensor."""
    path = run / "step-020.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ns.CorruptFileError):
        ns.apply(tmp_path / "0", run, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def entries(path: Path) -> dict[str, bytes]:
    """All that a patch says, but for the names of checkpoints and its hash."""
    return {name: bits.tobytes() for name, (_, bits) in raw_read(path).items()}


def manifest(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(read_header(path).metadata["neuron_patch"])
    return facts


@pytest.mark.parametrize(
    "options", [{}, {"fast": True}, {"reversible": True}, {"weights_only": True}], ids=str
)
def test_the_merge_of_a_chain_is_the_patch_from_its_first_to_its_last(
    run: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    """Byte for byte, whatever the tables, forms and files of its links are."""
    merged = ns.merge([run], chain=True, base=tmp_path / "0", out=tmp_path / "merged", **options)
    merged.close()
    ns.extract(tmp_path / "0", tmp_path / "4", lossless=True, out=tmp_path / "direct", **options).close()
    assert entries(tmp_path / "merged") == entries(tmp_path / "direct")
    one, other = manifest(tmp_path / "merged"), manifest(tmp_path / "direct")
    assert one == other | {"content_hash": one["content_hash"]}
    ns.apply(tmp_path / "0", tmp_path / "merged", out=tmp_path / "out")
    if "weights_only" not in options:
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "4")


@pytest.mark.parametrize("cut", range(1, STEPS - 1))
def test_a_merged_patch_is_a_link_again(run: Path, tmp_path: Path, cut: int, neft) -> None:
    """The chain of the merges is the merge of the chain."""
    links = sorted(run.iterdir())
    for name, part in (("head", links[:cut]), ("tail", links[cut:])):
        base = tmp_path / ("0" if name == "head" else str(cut))
        ns.merge(part, chain=True, base=base, out=tmp_path / name).close()
    done = neft("merge", "--chain", "head", "tail", "--base", "0", "-o", "both", "--json")
    assert done.code == 0, done.err
    assert done.json["bytes"] == (tmp_path / "both").stat().st_size
    ns.merge(links, chain=True, base=tmp_path / "0", out=tmp_path / "all").close()
    assert (tmp_path / "both").read_bytes() == (tmp_path / "all").read_bytes()
    ns.apply(tmp_path / "0", [tmp_path / "head", *links[cut:]], out=tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "4")


def test_a_merge_follows_its_patches(tmp_path: Path) -> None:
    for number in range(3):
        write_folder(tmp_path / str(number), {"w": np.arange(40, dtype=np.float32) + number})
    for name, kinds in {"all": (True, True), "some": (True, False)}.items():
        links = []
        for number, kind in enumerate(kinds):
            links.append(tmp_path / f"{name}{number}")
            sides = tmp_path / str(number), tmp_path / str(number + 1)
            ns.extract(*sides, lossless=True, fast=kind, reversible=kind, out=links[-1]).close()
        with ns.merge(links, chain=True, base=tmp_path / "0") as merged:
            assert (merged.fast, merged.reversible) == (all(kinds), all(kinds))
        with ns.merge(links, chain=True, base=tmp_path / "0", fast=False, reversible=False) as merged:
            assert (merged.fast, merged.reversible) == (False, False)


def test_a_chain_that_cannot_be_merged_is_refused(run: Path, tmp_path: Path, neft) -> None:
    first, second, third, _ = sorted(run.iterdir())
    ns.extract(tmp_path / "1", tmp_path / "2", lossless=True, weights_only=True, out=tmp_path / "w").close()
    ns.extract(tmp_path / "0", tmp_path / "1", neurons=3, out=tmp_path / "rows").close()
    wrong = write_folder(tmp_path / "wrong", {"w": np.zeros(3, np.float32)})
    before = snapshot(tmp_path)
    chain = ("merge", "--chain", "-o", "x")
    for words, code, says in (
        ((*chain, first, third, "--base", "0"), 3, "does not follow"),
        ((*chain, second, first, "--base", "0"), 3, "does not follow"),
        ((*chain, run, "--base", "1"), 3, "was made from another checkpoint"),
        ((*chain, run, "--base", wrong), 3, "was made from another checkpoint"),
        ((*chain, first, "w", "--base", "0"), 3, "weights only"),
        ((*chain, run), 2, "--base"),
        ((*chain, "rows", "--base", "0"), 2, "--chain is for lossless patches"),
        ((*chain, run, "--base", "0", "--on-overlap", "mean"), 2, "--on-overlap does not go with --chain"),
        ((*chain, run, "--base", "0", "--weights", "1"), 2, "--weights does not go with --chain"),
        (("merge", "--chain", run, "--base", "0", "-o", first), 2, "the input"),
        (("merge", "--chain", run, "--base", "0", "-o", first, "--force"), 2, "input"),
        (("merge", first, second, "-o", "x"), 3, "--chain"),
        (("merge", "rows", "-o", "x", "--fast"), 2, "--fast goes only with --chain"),
    ):
        done = neft(*words)
        assert (done.code, says in done.err, "Traceback" in done.err) == (code, True, False), done.err
    with pytest.raises(ns.UsageError, match="weights_only goes only with chain"):
        ns.merge([tmp_path / "rows"], weights_only=True)
    assert snapshot(tmp_path) == before
    done = neft(*chain, run, "--base", "0", "--dry-run", "--json")
    assert (done.code, done.json["dry_run"], done.json["tensors"]) == (0, True, 2)
    assert snapshot(tmp_path) == before


def test_a_base_whose_fingerprint_does_not_show_its_change_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((100, 100)).astype(np.float32)
    for number in range(3):
        write_folder(tmp_path / str(number), {"w": weight * (1 + number / 1000)})
    for number in range(2):
        sides = tmp_path / str(number), tmp_path / str(number + 1)
        ns.extract(*sides, lossless=True, out=tmp_path / f"p{number}").close()
    weight[50, 50] += 1
    write_folder(tmp_path / "other", {"w": weight})
    before = snapshot(tmp_path)
    with pytest.raises(ns.MismatchError, match="another checkpoint"):
        ns.merge([tmp_path / "p0", tmp_path / "p1"], chain=True, base=tmp_path / "other", out=tmp_path / "x")
    assert snapshot(tmp_path) == before
