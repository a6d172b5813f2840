"""A figure of the report: what is shown, how to read it, its numbers, and how it is drawn."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .. import text
from . import drawing
from .drawing import Draw

__all__ = ["Column", "Figure", "Table"]

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    key:
        Its name in CSV and JSON.
    title:
        Its name on the page.
    show:
        How a value that is there is shown to people.
    bar:
        Whether the page draws a bar behind the number, in proportion to the column's largest.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str
    bar: bool = False

    @property
    def is_number(self) -> bool:
        """Whether it is set flush right."""
        return self.show in (text.amount, text.percent, text.number)


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers as rows; a cell is a string, a number, or None for what is not known."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """As CSV with a header; floats in full."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return file.getvalue()

    def describe(self) -> list[dict[str, Cell]]:
        """For JSON: an object a row. What is not finite has no place there and becomes None."""
        keys = [column.key for column in self.columns]
        return [dict(zip(keys, (_finite(cell) for cell in row), strict=True)) for row in self.rows]


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


@dataclass(frozen=True, eq=False)
class Figure:
    """One figure.

    Attributes
    ----------
    id:
        A file name without its end and a place on the page; unique in a report.
    title, units:
        What is shown, and in which units.
    reading:
        One or two sentences on how to read it.
    table:
        Its numbers.
    draw:
        Draws it on an empty figure of matplotlib's; None for a figure that is its table.
    verdict:
        What it says here, in a sentence; may be empty.
    as_table:
        Whether a page shows the table in the picture's place.
    """

    id: str
    title: str
    units: str
    reading: str
    table: Table
    draw: Draw | None = None
    verdict: str = ""
    as_table: bool = False

    def png(self) -> bytes:
        """The picture as PNG, on white.

        Raises
        ------
        UsageError
            If matplotlib is not installed.
        """
        return drawing.png(self._draw(), dpi=200)

    def svg(self) -> str:
        """The picture as an SVG file, on white; raises as `png`."""
        return self._svg

    @cached_property
    def _svg(self) -> str:  # drawn once for the page and the folder
        return drawing.svg(self._draw(), self.id)

    def inline_svg(self) -> str:
        """The picture as an ``svg`` element for a page that defines the colours; raises as `png`."""
        return drawing.themed_svg(self.svg(), self.id, self.title)

    def _draw(self) -> Draw:
        if self.draw is None:
            raise ValueError(f"the figure {self.id} is a table, and has no picture")
        return self.draw

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        told: dict[str, Any] = {"title": self.title, "units": self.units, "reading": self.reading}
        if self.verdict:
            told["verdict"] = self.verdict
        return told | {"rows": self.table.describe()}
