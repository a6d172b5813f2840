"""report as a verb and as a command: outputs, refusals, what it says; and the small map of `diff`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time

import numpy as np
import pytest
from report_support import seven_billion
from support import process, snapshot

import neftsurgery as ns
from neftsurgery.reporting.training_record import loss_figure, training_facts


@pytest.fixture
def files(pair, tmp_path):
    """``scores.safetensors`` and ``patch.safetensors`` in ``tmp_path``."""
    ns.diff(*pair, out=tmp_path / "scores.safetensors").close()
    ns.extract(*pair, neurons="5%", out=tmp_path / "patch.safetensors").close()
    return tmp_path


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
    made = []
    for name in ("one", "two"):
        process(
            "report",
            "scores.safetensors",
            "-o",
            f"{name}.html",
            "--figures",
            name,
            cwd=files,
        )
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
def test_what_is_wrong_is_said(neft, files, words, code, said):
    result = neft("report", *words)
    assert (result.code, said in result.err) == (code, True), result.err
    assert not (files / "r.html").exists()


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
def test_every_budget_goes(neft, files, words):
    result = neft("report", "scores.safetensors", "--json", *words)
    assert result.code == 0, result.err
    chosen = neft("select", "scores.safetensors", "-o", "selection", "--json", *words).json
    assert result.json["sections"][0]["selected"] == chosen["selected"]
    assert sum(row["chosen"] for row in result.json["figures"]["map"]["rows"]) == chosen["selected"]


def test_a_score_that_is_the_norm_is_called_so(neft, pair, tmp_path):
    for score, said in (("norm", "is the control norm itself"), ("l2", "sensitive")):
        ns.diff(*pair, score=score, out=tmp_path / f"{score}.safetensors").close()
        verdict = neft("report", f"{score}.safetensors", "--json").json["sections"][0]["verdict"]
        assert said in verdict


def test_a_patch_alone(neft, files):
    result = neft("report", "patch.safetensors", "-o", "p.html", "--json")
    assert result.code == 0, result.err
    assert list(result.json["figures"]) == ["map"]
    with ns.Patch.load(files / "patch.safetensors") as patch:
        assert result.json["sections"][0]["neurons"] == patch.neurons


def test_two_files_of_one_name_are_told_apart(neft, files):
    (files / "a").mkdir()
    (files / "a" / "scores.safetensors").write_bytes((files / "scores.safetensors").read_bytes())
    result = neft("report", "scores.safetensors", "a/scores.safetensors", "a/scores.safetensors", "--json")
    names = [section["name"] for section in result.json["sections"][:3]]
    assert len(set(names)) == 3
    assert names[1:] == ["a/scores.safetensors", "a/scores.safetensors (2)"]
    assert result.json["figures"]["overlap"]["rows"][0]["jaccard"] == 1.0


def test_the_loss_curve_of_a_manifest():
    curve = [{"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": 1.5, "dev_loss": 1.7}]
    figure = loss_figure({"training": {"curve": curve, "steps": 20, "data": "x.jsonl"}})
    assert figure is not None
    assert figure.table.rows == ((10, 2.0, None), (20, 1.5, 1.7))
    assert figure.png().startswith(b"\x89PNG")
    assert training_facts({"training": {"steps": 2000, "data": "\x1b[2J"}}) == [
        ("steps", "2,000"),
        ("data", "\\x1b[2J"),
    ]


@pytest.mark.parametrize(
    "training",
    [
        None,
        [],
        "x",
        {},
        {"curve": "x"},
        {"curve": [1, None, {}]},
        {"curve": [{"step": "1", "train_loss": 1}]},
        {"curve": [{"step": 1, "train_loss": True}]},
        {"curve": [{"step": 1, "train_loss": 10**400}]},
        {"curve": [{"step": -1, "train_loss": 1.0}]},
    ],
)
def test_a_manifest_may_say_anything_of_its_training(training):
    assert loss_figure({"training": training}) is None
    training_facts({"training": training})


def test_without_matplotlib_it_says_what_to_install(neft, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = neft("report", "scores.safetensors", "-o", "r.html")
    assert (result.code, "pip install 'neftsurgery[report]'" in result.err) == (2, True)
    assert neft("report", "scores.safetensors", "--json").code == 0


def on_a_terminal(*words, cwd, **environment):
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", *words],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert done.wait(60) == 0
    return b"".join(parts).decode()


def test_diff_shows_a_small_map_on_a_terminal(neft, pair, tmp_path):
    assert "2 layers from left to right" not in neft("diff", "base", "tuned").out
    shown = on_a_terminal("diff", "base", "tuned", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert "2 layers from left to right" in shown
    assert "█" in shown
    plain = on_a_terminal("diff", "base", "tuned", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert "2 layers from left to right" in plain
    assert plain.isascii()


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
