"""The scores of the base alone: ``lowrank`` against numpy's SVD, ``magnitude``, and no second checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import LLAMA_CONFIG, vectors_of, write_file, write_folder

import neftsurgery as ns

Array = NDArray[Any]


def truncated(matrix: Array, rank: int) -> Array:
    """The best approximation of a rank, from all singular values."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def row_norms(matrix: Array, rank: int) -> Array:
    return np.linalg.norm(truncated(matrix, rank), axis=1)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (90_000, 14)])  # the last is read in several blocks
@pytest.mark.parametrize("rank", [1, 5, 99])
def test_a_row_scores_its_norm_in_the_approximation(tmp_path: Path, shape: Any, rank: int) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    file = write_file(tmp_path / "a.safetensors", {"w": matrix})
    scores = ns.diff(file, score="lowrank", rank=rank)
    np.testing.assert_allclose(scores.values("w"), row_norms(matrix, rank), rtol=1e-5)
    assert scores.facts["rank"] == rank


def test_each_expert_is_a_matrix_and_columns_may_be_neurons(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {"experts.w": rng.standard_normal((3, 8, 6)), "kernel": rng.standard_normal((9, 5))}
    tensors = {name: one.astype(np.float32) for name, one in tensors.items()}
    file = write_file(tmp_path / "a.safetensors", tensors)
    scores = ns.diff(file, score="lowrank", rank=2, axis={"experts.w": (0, 1), "kernel": 1})
    expected = np.concatenate([row_norms(one, 2) for one in tensors["experts.w"]])
    np.testing.assert_allclose(scores.values("experts.w"), expected, rtol=1e-5)
    np.testing.assert_allclose(scores.values("kernel"), row_norms(tensors["kernel"].T, 2), rtol=1e-5)


def test_a_unit_scores_the_norm_of_all_its_vectors(tmp_path: Path, llama_arrays: Any) -> None:
    tensors = llama_arrays()
    folder = write_folder(tmp_path / "base", tensors, config=LLAMA_CONFIG)
    scores = ns.diff(folder, anatomy="units", score="lowrank", rank=3)
    squares = np.zeros(scores.units)
    for name, tensor in scores.tensors.items():
        norms = row_norms(vectors_of(tensors[name], tensor.layout.axes), 3)
        np.add.at(squares, scores.sums(name, "unit"), norms**2)
    for name in scores.tensors:
        expected = np.sqrt(squares[scores.sums(name, "unit")])
        np.testing.assert_allclose(scores.values(name), expected, rtol=1e-5)


def test_a_vector_that_is_not_finite_has_no_score_and_harms_no_other(tmp_path: Path) -> None:
    matrix = np.random.default_rng(2).standard_normal((7, 4))
    holed = matrix.copy()
    holed[2, 1], holed[4, 0], holed[5, 3] = np.nan, np.inf, 1e200
    file = write_file(tmp_path / "a.safetensors", {"w": holed})
    matrix[[2, 4, 5]] = 0
    expected = row_norms(matrix, 2)
    expected[[2, 4, 5]] = np.nan
    np.testing.assert_allclose(ns.diff(file, score="lowrank", rank=2).values("w"), expected, rtol=1e-5)


def test_the_base_is_scored_without_a_fine_tune(tmp_path: Path) -> None:
    matrix = np.random.default_rng(3).standard_normal((30, 6)).astype(np.float32)
    base = write_file(tmp_path / "a.safetensors", {"w": matrix})
    norms = np.linalg.norm(matrix, axis=1)
    for score, expected in (("magnitude", norms), ("norm", 1 / norms)):
        scores = ns.diff(base, score=score)
        np.testing.assert_allclose(scores.values("w"), expected, rtol=1e-6)
        assert scores.tuned.name is None
        assert scores.base.name
        assert scores.select(neurons=1).tensors["w"].index.tolist() == [int(np.argmax(expected))]
    with pytest.raises(ns.UsageError, match="compares the base with a tuned"):
        ns.diff(base)
    with pytest.raises(ns.UsageError, match="rank"):
        ns.diff(base, score="lowrank", rank=0)


def test_the_command_takes_the_base_alone(tmp_path: Path) -> None:
    matrix = np.random.default_rng(4).standard_normal((30, 6)).astype(np.float32)
    base = write_file(tmp_path / "a.safetensors", {"w": matrix})

    def run(*args: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "neftsurgery", "diff", base, *args]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    done = run("--score", "lowrank", "--rank", 2, "--json", "-o", tmp_path / "s")
    answer = json.loads(done.stdout)
    best = int(np.argmax(row_norms(matrix, 2)))
    assert (answer["tuned"], answer["most_sensitive"][0]["index"]) == (None, best)
    shown = run("--score", "lowrank", "--rank", 2).stdout
    assert f"w [{best}]" in shown
    assert "identical" not in shown
    refused = run()
    assert refused.returncode == 2
    assert "name it, or take a score of the base alone: magnitude, lowrank, norm, random" in refused.stderr
