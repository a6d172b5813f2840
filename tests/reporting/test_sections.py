"""The sections of a report: what their JSON holds."""

from __future__ import annotations

import pytest

import neftsurgery as ns


def test_a_patch_alone(neft, files):
    result = neft("report", "patch.safetensors", "-o", "p.html", "--json")
    assert result.code == 0, result.err
    assert list(result.json["figures"]) == ["map"]
    with ns.Patch.load(files / "patch.safetensors") as patch:
        assert result.json["sections"][0]["neurons"] == patch.neurons


@pytest.mark.parametrize(
    "words",
    [
        ("--params", "10%"),
        ("--threshold", "0"),
        ("--changed",),
        ("--neurons", "20", "--per", "layer"),
        ("--neurons", "5%", "--per", "tensor", "--max-per-tensor", "3"),
        ("--neurons", "5%", "--policy", "random", "--seed", "3"),
        ("--neurons", "5%", "--policy", "reversed"),
    ],
)
def test_every_budget_works(neft, files, words):
    result = neft("report", "scores.safetensors", "--json", *words)
    assert result.code == 0, result.err
    chosen = neft("select", "scores.safetensors", "-o", "selection", "--json", *words).json
    assert result.json["sections"][0]["selected"] == chosen["selected"]
    assert sum(row["chosen"] for row in result.json["figures"]["map"]["rows"]) == chosen["selected"]
