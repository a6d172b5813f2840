"""The tables of the selection suite, made from invented lines and compared with values computed by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import json_lines
from benchmarks.page.paired import over_seeds, over_sentences
from benchmarks.page.selection import BEGIN, END, pair_row, pairs, quality_row, render_selection
from benchmarks.page.study import OLD, Mean, Study

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [2, 4, 4]


def run(arm: str, seed: int, test: float, **more: Any) -> dict[str, Any]:
    """A finished run whose sentences have a mean loss of ``test`` per token."""
    return {
        "kind": "run", "arm": arm, "seed": seed, "rung": 3, "rate": 8e-3, "loss": test + 0.1,
        "test": test, "astray": test + 0.25, "bleu": 5.0, "chrf": 10.0,
        "best": 40, "step": 0.05, "seconds": 3.0, "peak": 5_000_000,
        "trainable": 30, "choosing": 0.2, "date": "2026-01-01", "old": dict.fromkeys(OLD, 3.0),
        "sentences": {"loss": [test * n for n in TOKENS], "chrf": [10.0, 20.0, 30.0]}, **more,
    }  # fmt: skip


def write(file: Path) -> None:
    shape = {"layers": 1, "hidden": 8, "ffn": 16, "vocabulary": 100}
    schedule = {"steps": 100, "batch": 4, "look": 10}
    setting = {"scale": "small", "device": "cpu", "shape": shape, "pretrain": schedule, "tune": schedule}
    here = {
        "processor": "a processor", "cores": 2, "memory_gb": 8, "kernel": "Linux", "file_system": "ext4",
        "load": 0.1, "python": "3.11", "packages": {},
    }  # fmt: skip
    counts = {"pretrain": 1000, "train": 50, "dev": 3, "test": 3}
    old = {"english": 1.0, "chinese": 2.0, "backward": 3.0, "articles": 4.0}
    selection = {"neurons": 4, "captured": 0.125, "where": {"q_proj": 4}}
    found: list[dict[str, Any]] = [
        {
            "kind": "setting",
            "setting": setting | {"pretrain_rate": 1e-3},
            "pairs": counts,
            "command": "do",
            "machine": here,
        },
        {"kind": "base", "parameters": 1000, "seconds": 1.0, "fingerprint": "f", "tokens": TOKENS},
        run("base", 1, 6.0, trainable=0, old=old),
    ]
    found += [
        {"kind": "tuning", "arm": "neft-3", "seed": 0, "rung": n, "rate": 1e-3 * 2**n, "loss": 5.0}
        for n in (2, 3, 4)
    ]
    found.append({"kind": "tuning", "arm": "random-3", "seed": 0, "rung": 3, "rate": 8e-3, "loss": 5.0})
    for seed, (ours, random) in enumerate([(2.0, 2.1), (2.2, 2.5), (2.1, 2.3)], 1):
        found.append(run("neft-3", seed, ours, selection=selection, bleu=4.0 + seed))
        found.append(run("random-3", seed, random, selection=selection))
    for line in found:
        json_lines.append(file, line)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    write(tmp_path / "selection-small.jsonl")
    return Study.load(tmp_path / "selection-small.jsonl")


def test_the_main_table_has_means_and_deviations_over_seeds(study):
    # Rate 8e-3 lies between others that were tried. Old text: (2 + 1 + 0 - 1) / 4 = 0.5 nats more.
    assert quality_row(study, study.results["neft-3"]) == (
        "| **NeFT: sensitive rows, 3%** | 3.00 | 0.008 | 2.200 ± 0.100 | 2.100 ± 0.100 | +0.25 | 6.00 ± 1.00 "
        "| 10.00 ± 0.00 | +0.500 ± 0.000 | 3 |"
    )
    assert "| 0.008 (bound) |" in quality_row(study, study.results["random-3"])
    assert quality_row(study, study.results["base"]).startswith("| *base, untuned* | 0.00 |")


def test_pairs_are_tested_over_seeds_and_over_sentences(study):
    # Differences -0.1, -0.3, -0.2: mean -0.2, deviation 0.1, t = -0.2 / (0.1 / sqrt 3) = -3.464 with 2
    # degrees of freedom, so p = 1 - |t| / sqrt(t^2 + 2) = 0.0742. The interval is 4.3027 standard errors wide
    # on each side.
    reach = 4.3027 * 0.1 / math.sqrt(3)
    row = pair_row(study, "neft-3", "random-3")
    assert row is not None
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:2] == ["NeFT: sensitive rows, 3%", "random rows, 3%"]
    assert cells[2] == f"-0.200 ({-0.2 - reach:+.3f} to {-0.2 + reach:+.3f})"
    assert cells[3] == f"{1 - math.sqrt(12) / math.sqrt(14):.3f}" == "0.074"
    assert cells[4] == "**-0.200 (-0.200 to -0.200)**"  # all sentences have the same difference
    assert cells[5] == "+0.000 (+0.000 to +0.000)"
    assert pair_row(study, "neft-9", "random-9") is None
    assert ("neft-3", "random-3") in set(pairs(study))


def test_one_seed_has_no_interval_and_no_deviation():
    assert over_seeds([1.0], [1.5]).interval is None
    assert f"{Mean.of([1.0]):.1f}" == "1.0"
    assert over_seeds([1.0, 2.0], [1.5, 2.5]).p is None  # without variance a test would divide by zero


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_ratio():
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 20, 400)
    base = rng.normal(2, 0.5, (2, 400)) * tokens
    shift = rng.normal(-0.1, 0.3, 400) * tokens
    found = over_sentences(base + shift, base, tokens.tolist())
    middle = shift.sum() / tokens.sum()
    error = np.sqrt(((shift - middle * tokens) ** 2).sum()) / tokens.sum()  # the delta method
    assert found.estimate == pytest.approx(middle)
    assert found.low == pytest.approx(middle - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(middle + 1.96 * error, abs=0.1 * error)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prose_stays_and_generated_tables_are_replaced(tmp_path):
    folder, page = tmp_path / "results", tmp_path / "results.md"
    write(folder / "selection-small.jsonl")
    page.write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    render_selection(folder)
    once = page.read_text()
    assert once.startswith(f"# Mine\n\nbefore\n\n{BEGIN}\n\n## Translation, scale small")
    assert once.endswith(f"{END}\n\nafter\n")
    assert "\nold\n" not in once
    added = " | ".join(f"{3.0 - base:+.3f} ± 0.000" for base in (1.0, 2.0, 3.0, 4.0))
    assert f"| **NeFT: sensitive rows, 3%** | {added} |" in once
    assert "| **NeFT: sensitive rows, 3%** | 30 | 4 | 12.5% | 0.2 | 50 ± 0 | 40 | 5 ± 0 |" in once
    picture = (folder / "selection-small.svg").read_bytes()
    render_selection(folder)
    assert page.read_text() == once
    assert (folder / "selection-small.svg").read_bytes() == picture


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_task_without_translations_has_no_translation_columns(tmp_path):
    write(tmp_path / "results" / "selection-small.jsonl")
    for line in json_lines.load(tmp_path / "results" / "selection-small.jsonl"):
        kept = {key: value for key, value in line.items() if key not in ("astray", "bleu", "chrf")}
        if "sentences" in kept:
            kept["sentences"] = {"loss": kept["sentences"]["loss"]}
        if "setting" in kept:
            kept["setting"] |= {"task": "plays", "piece": 16}
        json_lines.append(tmp_path / "results" / "selection-small-plays.jsonl", kept)
    render_selection(tmp_path / "results")
    plays, both = (tmp_path / "results.md").read_text().split("## Translation, scale small")
    assert "## Plays, scale small, on a processor" in plays
    row = (
        "| **NeFT: sensitive rows, 3%** | 3.00 | 0.008 | 2.200 ± 0.100 | 2.100 ± 0.100 | +0.500 ± 0.000 | 3 |"
    )
    assert row in plays
    assert "BLEU" not in plays
    assert "chrF" not in plays
    assert "50 pieces of 16 tokens for fine-tuning" in plays
    assert both.count("chrF") == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_in_docs_matches_its_lines(tmp_path):
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    shutil.copy(ROOT / "docs" / "results.md", tmp_path)
    render_selection(tmp_path / "results")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()


def test_a_truncated_line_is_ignored_and_replaced_by_the_next(tmp_path):
    file = tmp_path / "runs.jsonl"
    json_lines.append(file, {"n": 1, "text": "中文"})
    with file.open("a") as stream:
        stream.write('{"n": 2, "te')
    assert json_lines.load(file) == [{"n": 1, "text": "中文"}]
    json_lines.append(file, {"n": 3})
    assert [json.loads(line)["n"] for line in file.read_text().splitlines()] == [1, 3]
    assert json_lines.load(tmp_path / "none.jsonl") == []
