"""Descriptors: many more shards than there are descriptors, and none kept by many calls of each verb."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import LLAMA_CONFIG, llama, snapshot, write_folder

import neftsurgery as ns

SHARDS, CALLS = 60, 60


def tuned_from(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {n: (a + 1e-3 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in base.items()}


def limited(folder: Path, most: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "neftsurgery", *words, "-q"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("most", [24])
def test_many_shards_with_few_descriptors(tmp_path: Path, most: int) -> None:
    rng = np.random.default_rng(0)
    base = {f"layers.{n}.mlp.up_proj.weight": rng.standard_normal((100, 128), "f4") for n in range(SHARDS)}
    for name, arrays in (("base", base), ("tuned", tuned_from(base))):
        write_folder(tmp_path / name, arrays, SHARDS, {"model_type": "?"})
    for words in (
        "inspect base",
        "diff base tuned -o scores",
        "extract base tuned --scores scores --neurons 50% --reversible -o patch",
        "extract base tuned --neurons 50% --policy random -o other",
        "verify base patch --expect base",
        "apply base patch -o patched",
        "verify patched patch --expect patched",
        "revert patched patch -o back",
        "merge patch other --on-overlap mean -o merged",
        "export patch --to lora -o adapter",
    ):
        done = limited(tmp_path, most, *words.split())
        assert (done.returncode, done.stderr) == (0, ""), words
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "base")
    before = snapshot(tmp_path / "base")
    done = limited(tmp_path, most, "apply", "base", "patch", "--in-place")  # locks every file at once
    assert done.returncode == 5
    assert "open files" in done.stderr
    assert snapshot(tmp_path / "base") == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verbs")
    base = llama(16, 24, 1, 8, 0)
    config = {**LLAMA_CONFIG, "hidden_size": 16}
    write_folder(root / "base", base, 2, config)
    write_folder(root / "tuned", tuned_from(base), 2, config)
    sides = root / "base", root / "tuned"
    ns.diff(*sides, out=root / "scores").close()
    ns.extract(*sides, neurons=9, reversible=True, out=root / "patch").close()
    ns.apply(sides[0], root / "patch", out=root / "patched")
    ns.apply(sides[0], root / "patch", out=root / "model")
    return root


def scores(root: Path) -> None:
    with ns.Scores.load(root / "scores") as opened:
        opened.select(neurons=3).save(root / "selection", force=True)


def refused(root: Path) -> None:
    with pytest.raises(ns.NeftError):
        ns.Patch.load(root / "scores")
    with pytest.raises(ns.NeftError):
        ns.apply(root / "scores", root / "patch", out=root / "never")


VERBS: dict[str, Callable[[Path], object]] = {
    "diff": lambda root: ns.diff(root / "base", root / "tuned").close(),
    "diff, not closed": lambda root: ns.diff(root / "base", root / "tuned"),
    "select": scores,
    "extract": lambda root: ns.extract(root / "base", root / "tuned", neurons=9, out=root / "p", force=True),
    "apply": lambda root: ns.apply(root / "base", root / "patch", out=root / "o", force=True),
    "revert": lambda root: ns.revert(root / "patched", root / "patch", out=root / "b", force=True),
    "in place": lambda root: (
        ns.revert(root / "model", root / "patch", in_place=True),
        ns.apply(root / "model", root / "patch", in_place=True),
    ),
    "verify": lambda root: ns.verify(root / "base", root / "patch"),
    "merge": lambda root: ns.merge([root / "patch", root / "patch"], on_overlap="mean").close(),
    "export": lambda root: ns.export_lora(root / "patch", root / "adapter", force=True),
    "heal": lambda root: ns.heal(root / "base"),
    "inspect": lambda root: ns.inspect(root / "patch"),
    "an error": refused,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors are counted as Linux lists them")
@pytest.mark.parametrize("verb", VERBS)
def test_no_descriptor_is_kept(folder: Path, verb: str) -> None:
    VERBS[verb](folder)  # imports, and files that stay open for the whole process
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(CALLS):
        VERBS[verb](folder)
        assert len(os.listdir("/proc/self/fd")) < before + CALLS - 10
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
