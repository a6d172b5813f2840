"""The page's table is that of its figures, and tells losses as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torture.ledger import Ledger
from torture.page import BEGIN, END, put_table, table

DOCS = Path(__file__).parents[2] / "docs"


def test_a_trial_that_fails_is_a_loss_and_fails_the_test(tmp_path: Path) -> None:
    ledger = Ledger()
    with ledger.trial("fire", "apply"):
        pass
    with pytest.raises(AssertionError), ledger.trial("fire", "apply"):
        raise AssertionError
    with ledger.trial("water", "revert"):
        pass
    ledger.write(tmp_path / "ledger")
    rows = json.loads((tmp_path / "ledger").read_text())
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
