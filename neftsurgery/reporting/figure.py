"""A figure of the report: its captions, its table of numbers, and the function that draws it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .. import text
from . import plotting
from .plotting import DrawFunction

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    key: str  # the name in CSV and JSON
    title: str  # the heading on the page
    show: Callable[[Any], str] = str  # formats a value other than None
    bar: bool = False  # whether a bar is drawn behind the number, in proportion to the column's largest

    @property
    def is_number(self) -> bool:
        """Whether the column is aligned right."""
        return self.show in (text.commas, text.percent, text.four_digits, text.size)


# Columns of many tables.
LAYER, KIND = Column("layer", "layer", text.label), Column("kind", "kind of weight", text.label)
SHARE = Column("share", "share", text.percent, bar=True)
RANK, TENSOR, INDEX = (
    Column("rank", "", text.commas),
    Column("tensor", "tensor", text.label),
    Column("index", "index", text.commas),
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of numbers. A cell is a string, a number, or None for an unknown value."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """The table as CSV with a header and full-precision floats."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return file.getvalue()

    def describe(self) -> list[dict[str, Cell]]:
        """The table as JSON, one object per row. NaN and infinities become None."""
        keys = [column.key for column in self.columns]
        return [dict(zip(keys, (_finite(cell) for cell in row), strict=True)) for row in self.rows]


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


@dataclass(frozen=True, eq=False)
class ReportFigure:
    """One figure of a report."""

    id: str  # the anchor on the page, and the file name without its suffix; unique in a report
    title: str
    units: str
    reading: str  # one or two sentences on how to read it
    table: Table  # the numbers of the figure
    draw: DrawFunction | None = None  # on an empty matplotlib figure; None: there is only the table
    verdict: str = ""  # the result in one sentence; may be empty
    as_table: bool = False  # whether the page shows the table instead of the image

    def png(self) -> bytes:
        """The image as a PNG on white. Raises UsageError if matplotlib is not installed."""
        return plotting.png(self._draw(), dpi=200)

    def svg(self) -> str:
        """The image as an SVG file on white. Raises like `png`."""
        return self._svg

    @cached_property
    def _svg(self) -> str:  # drawn once, for the page and for the folder of figures
        return plotting.svg(self._draw(), self.id)

    def _draw(self) -> DrawFunction:
        if self.draw is None:
            raise ValueError(f"the figure {self.id} has only a table and no image")
        return self.draw

    def describe(self) -> dict[str, object]:
        """The figure as JSON: its captions and the rows of its table."""
        captions = {"title": self.title, "units": self.units, "reading": self.reading}
        if self.verdict:
            captions["verdict"] = self.verdict
        return {**captions, "rows": self.table.describe()}
