"""The Markdown table of faults, with how often each was tried and how many losses it caused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["put_table", "table"]

FEW = 4
#: Faults that are counted by what reads a file.
READERS = ("hostile file", "JSON of many or long values")
BEGIN, END = "<!-- table: made by `make torture` -->", "<!-- end of table -->"


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The table's lines: each fault with what it was tried on, then the sum."""
    yield "| fault | while | tried | losses |"
    yield "|---|---|--:|--:|"
    faults: dict[str, list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        faults.setdefault(row["fault"], []).append(row)
    for fault, rows in faults.items():
        what = "readers" if fault in READERS else "commands"
        works = ", ".join(row["work"] for row in rows) if len(rows) <= FEW else f"{len(rows)} {what}"
        yield f"| {fault} | {works} | {_total(rows, 'tried')} | {_total(rows, 'losses')} |"
    every = figures["rows"]
    yield f"| **all** | | **{_total(every, 'tried')}** | **{_total(every, 'losses')}** |"


def _total(rows: list[dict[str, Any]], key: str) -> str:
    return f"{sum(row[key] for row in rows):,}"


def put_table(page: Path, figures: dict[str, Any]) -> None:
    """Replace the table between its markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "\n".join([f"On {figures['machine']}:", "", *table(figures)])
    page.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}")
