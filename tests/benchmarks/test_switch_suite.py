"""The switch suite, very small: every contestant puts the same rows in, and the page has the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.page.gpu import render_gpu
from benchmarks.switch import suite
from benchmarks.switch.options import Options

JOB: dict[str, Any] = {
    "device": "cpu", "dtype": "bf16", "shape": "tiny", "layers": 1, "length": 8, "checkpointing": False,
}  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_every_contestant_puts_the_same_rows_in(number: int, tmp_path: Path) -> None:
    prepared = suite.prepare(JOB, 0.1, tmp_path)
    for name, ours in (("resident", "first"), ("host", "ours")):
        for weight in prepared.weights.values():
            weight.zero_()
        prepared.turns[name](number)
        prepared.turns[ours](number)
        for weight, index, values in prepared.sides[number]:
            assert values.abs().max() > 0
            assert torch.equal(prepared.weights[weight][index], values), name
            assert torch.equal(prepared.model.get_parameter(weight)[index], values)


def test_results_and_page(tmp_path: Path) -> None:
    suite.measure(Options("cpu", "bf16", "tiny", 1, 3.0, 2, tmp_path / "gpu"))
    render_gpu(tmp_path / "gpu")
    page = (tmp_path / "gpu.md").read_text()
    assert "takes at most twice the time of `index_copy_` of its rows" in page
    for name in suite.CONTESTANTS.values():
        assert name in page
