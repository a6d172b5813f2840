"""The sections of a report: what their JSON holds."""

from __future__ import annotations

import pytest
from hub_support import patch_of

import neftsurgery as ns
from neftsurgery.text import percent


def test_a_patch_alone(neft, files):
    result = neft("report", "patch.safetensors", "-o", "p.html", "--json")
    assert result.code == 0, result.err
    assert list(result.json["figures"]) == ["map"]
    with ns.Patch.load(files / "patch.safetensors") as patch:
        assert result.json["sections"][0]["neurons"] == patch.neurons
        held = f"Its neurons hold {percent(patch.facts.captured)} of the change. The rest"
    page = (files / "p.html").read_text()
    assert 0 < page.index(f'<p class="verdict">{held}') < page.index('<dl class="facts">')


def test_a_section_says_first_what_to_take_home(files, tmp_path):
    scores = ns.report(files / "scores.safetensors").sections[0]
    sensitive, share = scores.verdict
    assert sensitive == scores.data["verdict"]
    assert share.startswith(f"The chosen neurons hold {percent(scores.data['captured'])} of the change")
    assert "The rest of the fine-tune is not in them" in share
    patch_of(tmp_path / "trained.safetensors", {"h.0.w": 2}, training={"steps": 3}).close()
    assert "whole fine-tune" in ns.report(tmp_path / "trained.safetensors").sections[0].verdict[0]
    patch_of(tmp_path / "plain.safetensors", {"h.0.w": 2}).close()
    assert ns.report(tmp_path / "plain.safetensors").sections[0].verdict == []


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
