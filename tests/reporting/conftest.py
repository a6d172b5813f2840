"""Fixtures of the report's tests."""

from __future__ import annotations

import pytest

import neftsurgery as ns


@pytest.fixture
def scores(pair, tmp_path):
    ns.diff(*pair, out=tmp_path / "scores.safetensors").close()
    return tmp_path / "scores.safetensors"


@pytest.fixture
def told(neft, scores):
    result = neft("report", scores, "--json", "--neurons", "5%")
    assert result.code == 0, result.err
    return result.json


@pytest.fixture
def files(pair, tmp_path):
    """``scores.safetensors`` and ``patch.safetensors`` in ``tmp_path``."""
    ns.diff(*pair, out=tmp_path / "scores.safetensors").close()
    ns.extract(*pair, neurons="5%", out=tmp_path / "patch.safetensors").close()
    return tmp_path
