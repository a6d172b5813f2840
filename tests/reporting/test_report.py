"""The verb and the command: outputs, refusals, messages."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from report_support import seven_billion
from support import process, snapshot

import neftsurgery as ns


def test_page_figures_and_json(neft, files):
    result = neft("report", "scores.safetensors", "-o", "report.html", "--figures", "figures", "--json")
    assert result.code == 0, result.err
    assert (files / "report.html").read_text().startswith("<!doctype html>")
    names = set(result.json["figures"])
    assert names == set(result.json["sections"][0]["figures"])
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")}
    assert {path.name for path in (files / "figures").iterdir()} == expected
    for name in names:
        assert (files / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (files / "figures" / f"{name}.svg").read_text()
    told = neft("report", "scores.safetensors", "-o", "report.html", "--force")
    assert "wrote report.html (7 figures" in told.out
    assert "smallness" in told.out


@pytest.mark.slow
def test_the_same_files_make_the_same_bytes(files):
    """Of processes: the layout's solver may order its variables otherwise in one that has drawn before."""
    made = []
    for name in ("one", "two"):
        words = ("report", "scores.safetensors", "-o", f"{name}.html", "--figures", name)
        assert process(*words, cwd=files).code == 0
        made.append(((files / f"{name}.html").read_bytes(), snapshot(files / name)))
    assert made[0] == made[1]


def test_nothing_is_overwritten_without_force(neft, files):
    (files / "report.html").write_text("mine")
    (files / "figures").mkdir()
    (files / "figures" / "mine.txt").write_text("mine")
    for words in (("-o", "report.html"), ("--figures", "figures"), ("-o", "scores.safetensors", "--force")):
        result = neft("report", "scores.safetensors", *words)
        assert result.code == 2, result.out
    assert (
        neft("report", "scores.safetensors", "-o", "figures/r.html", "--figures", "figures", "--force").code
        == 2
    )
    assert (files / "report.html").read_text() == (files / "figures" / "mine.txt").read_text() == "mine"
    assert neft("report", "scores.safetensors", "-o", "report.html", "--force").code == 0
    assert (files / "report.html").read_text() != "mine"
    assert not [path for path in files.iterdir() if ".neft-" in path.name]


def test_a_dry_run_writes_nothing_and_refuses_as_the_run_does(neft, files):
    before = sorted(path.name for path in files.iterdir())
    result = neft("report", "scores.safetensors", "-o", "r.html", "--figures", "f", "--dry-run", "--json")
    assert (result.code, result.json["dry_run"]) == (0, True)
    assert (
        "would write the page to r.html"
        in neft("report", "scores.safetensors", "-o", "r.html", "--dry-run").out
    )
    assert neft("report", "scores.safetensors", "-o", "patch.safetensors", "--dry-run").code == 2
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("base", "-o", "r.html"), 2, "expected a scores file or a patch, found a folder"),
        (("nothing", "-o", "r.html"), 2, "there is no such file"),
        (("base/config.json", "-o", "r.html"), 4, "config.json"),
        (("base/model-00001-of-00002.safetensors", "-o", "r.html"), 2, "neither a scores file nor a patch"),
        (("scores.safetensors",), 2, "-o report.html"),
        (("scores.safetensors", "-o", "r.html", "--threshold", "9"), 3, "no neuron is chosen"),
        (("scores.safetensors", "-o", "r.html", "--neurons", "0"), 2, "at least 1"),
        (("scores.safetensors", "-o", "no/r.html"), 2, "does not exist"),
    ],
)
def test_errors_name_the_problem(neft, files, words, code, said):
    result = neft("report", *words)
    assert (result.code, said in result.err) == (code, True), result.err
    assert not (files / "r.html").exists()


def test_without_matplotlib_it_says_what_to_install(neft, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = neft("report", "scores.safetensors", "-o", "r.html")
    assert (result.code, "pip install '.[report]'" in result.err) == (2, True)
    assert neft("report", "scores.safetensors", "--json").code == 0


@pytest.mark.slow
def test_scores_of_seven_billion_parameters_make_a_small_page_in_seconds(tmp_path):
    file = seven_billion(tmp_path / "scores.safetensors")
    start = time.process_time()
    made = ns.report(file, out=tmp_path / "report.html")
    assert time.process_time() - start < 20
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    rows = made.describe()["figures"]["map"]["rows"]
    assert (len(rows), sum(row["total"] for row in rows)) == (224, 1_359_872)
    assert sum(row["chosen"] for row in rows) == round(0.03 * 1_359_872)
    assert json.dumps(made.describe(), allow_nan=False)
    assert np.isfinite(made.describe()["sections"][0]["captured"])
