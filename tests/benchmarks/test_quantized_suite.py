"""The suite on quantized checkpoints, very small; and that its pairs are what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import neftsurgery as ns
from benchmarks.checkpoints.quantized import write_quantized_pair
from benchmarks.rivals import torch_dequantized as rival

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks need Linux")


@pytest.mark.parametrize("layout", ["fp8", "mxfp4"])
def test_torch_scores_the_pairs_alike(layout: str, tmp_path: Path) -> None:
    write_quantized_pair(tmp_path, layout, 10**6, 256)  # one weight at least
    scores = ns.diff(tmp_path / "base", tmp_path / "tuned", score="relative")
    ends, dequantize = rival.SUFFIXES[layout], {"fp8": rival.fp8, "mxfp4": rival.mxfp4}[layout]
    (name,) = scores.tensors
    parts = [load_file(tmp_path / side / "model.safetensors") for side in ("base", "tuned")]
    a, b = (dequantize(*(part[name + end] for end in ends)).double() for part in parts)
    assert 0.01 < a.std() < 0.03
    assert not torch.equal(parts[0][name + ends[0]], parts[1][name + ends[0]])
    found = scores.values(name).reshape(a.shape[:-1])
    np.testing.assert_allclose(found, ((b - a).norm(dim=-1) / a.norm(dim=-1)).numpy(), rtol=1e-5)


@pytest.mark.slow
def test_layouts_are_measured_and_shown_on_the_page(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "benchmarks"
    words = ["quantized", "--quick", "--only", "fp8", "--no-rivals", "--work", tmp_path / "w", "--out", out]
    subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=ROOT, check=True, capture_output=True)
    part = json.loads((out / "quantized.json").read_text())["fp8"]
    assert [group["label"] for group in part["groups"]] == ["in the page cache", "not in the page cache"]
    page = (out.parent / "benchmarks-quantized.md").read_text()
    assert "diff reaches 0.4 of the plain reads' throughput | share of their throughput: " in page
    assert f"`{part['command']}`" in page
    assert str(tmp_path) not in page
