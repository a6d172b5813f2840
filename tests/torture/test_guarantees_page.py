"""The page's table shows the figures in its JSON file, losses included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torture.table import BEGIN, END, put_table, table
from torture.trials import Trials

DOCS = Path(__file__).parents[2] / "docs"


def test_a_trial_that_fails_is_a_loss_and_fails_the_test(tmp_path: Path) -> None:
    trials = Trials()
    with trials.trial("fire", "apply"):
        pass
    with pytest.raises(AssertionError), trials.trial("fire", "apply"):
        raise AssertionError
    with trials.trial("water", "revert"):
        pass
    trials.write(tmp_path / "trials")
    rows = json.loads((tmp_path / "trials").read_text())
    page = tmp_path / "page.md"
    page.write_text(f"before {BEGIN} old {END} after")
    put_table(page, {"machine": "here", "rows": rows})
    text = page.read_text()
    assert "| fire | apply | 2 | 1 |" in text
    assert "| water | revert | 1 | 0 |" in text
    assert "| **all** | | **3** | **1** |" in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "old" not in text


def test_the_page_shows_its_figures() -> None:
    figures = json.loads((DOCS / "guarantees" / "figures.json").read_text())
    assert "\n".join(table(figures)) in (DOCS / "guarantees.md").read_text()
    assert all(row["losses"] == 0 for row in figures["rows"])
