"""Lossless patches that follow each other: a run's checkpoints from one base."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support import snapshot, write_folder

import neftsurgery as ns

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
