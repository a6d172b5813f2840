"""The report says which neurons quantization hurt most, by the numbers of float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from quantized_support import fp8

import neftsurgery as ns
from neftsurgery.reporting.report import report


def test_the_neurons_that_quantization_hurt_most(tmp_path: Path) -> None:
    weight = fp8(np.random.default_rng(0), "block")
    original, numbers = weight.original(tmp_path / "original", 0.05)
    ns.diff(original, weight.write(tmp_path / "quantized"), out=tmp_path / "scores")
    error = np.linalg.norm(weight.numbers - numbers, axis=1) / np.linalg.norm(numbers, axis=1)
    figures = report(tmp_path / "scores").describe()["figures"]
    assert isinstance(figures, dict)
    rows = figures["quantization"]["rows"]
    assert [row["index"] for row in rows] == np.argsort(-error, kind="stable")[:20].tolist()
    assert [row["relative"] for row in rows] == pytest.approx(np.sort(error)[::-1][:20])
    (row,) = figures["quantization-by-weight"]["rows"]
    assert (row["layer"], row["kind"], row["neurons"]) == ("model.layers.0", "mlp.up_proj", 300)
    assert (row["median"], row["largest"]) == pytest.approx((np.median(error), error.max()))


def test_scores_of_two_quantized_checkpoints_have_no_such_section(tmp_path: Path) -> None:
    weight = fp8(np.random.default_rng(0), "channel")
    ns.diff(weight.write(tmp_path / "a"), weight.moved().write(tmp_path / "b"), out=tmp_path / "scores")
    figures = report(tmp_path / "scores").describe()["figures"]
    assert isinstance(figures, dict)
    assert not [name for name in figures if "quantization" in name]
