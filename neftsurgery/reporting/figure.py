"""A figure of the report: its captions, its table of numbers, and the function that draws it."""

from __future__ import annotations

import csv
import functools
import io
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from .. import text
from . import plotting
from .plotting import DrawFunction

Cell = str | int | float | None

_NUMBERS: dict[str, Callable[[Any], str]] = {
    "count": text.commas, "percent": text.percent, "number": text.four_digits, "size": text.size,
}  # fmt: skip
_FORMS: dict[str, Callable[[Any], str]] = {
    "": str, "name": text.label, "words": lambda name: name.replace("_", " "), **_NUMBERS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    key: str  # the name in CSV and JSON
    title: str  # the heading on the page
    form: str = ""  # how its values are written
    bar: bool = False  # whether a bar is drawn behind the number, in proportion to the column's largest

    def show(self, value: Cell) -> str:
        """A value as the page shows it."""
        return "-" if value is None else _FORMS[self.form](value)

    @property
    def is_number(self) -> bool:
        """Whether the column is aligned right."""
        return self.form in _NUMBERS


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

    @classmethod
    def of(
        cls,
        name: str,
        suffix: str,
        rows: Iterable[tuple[Cell, ...]],
        draw: DrawFunction | None = None,
        verdict: str = "",
        *,
        package: str = __package__,
        **words: object,
    ) -> ReportFigure:
        """The figure ``name`` in ``figures.toml`` of a package; ``words`` fill its captions.

        Shorter rows leave out the last columns.
        """
        told, rows, columns = _described(package)[name], tuple(rows), list[Column]()
        for key, heading in told["columns"].items():
            title, _, form = heading.partition(" | ")
            form, _, bar = form.partition(" ")
            columns.append(Column(key, title.format(**words), form, bool(bar)))
        title, units, reading = (told[one].format(**words) for one in ("title", "units", "reading"))
        columns = columns[: len(rows[0])] if rows else columns
        table, as_table = Table(tuple(columns), rows), told.get("as_table", False)
        return cls(f"{name}{suffix}", title, units, reading, table, draw, verdict, as_table)

    def png(self) -> bytes:
        """The image as a PNG on white. Raises UsageError if matplotlib is not installed."""
        assert self.draw is not None  # else there is only a table
        return plotting.png(self.draw)

    def svg(self) -> str:
        """The image as an SVG file on white. Raises like `png`."""
        return self._svg

    @cached_property
    def _svg(self) -> str:  # drawn once, for the page and for the folder of figures
        assert self.draw is not None
        return plotting.svg(self.draw, self.id)

    def describe(self) -> dict[str, object]:
        """The figure as JSON: its captions and the rows of its table."""
        captions = {"title": self.title, "units": self.units, "reading": self.reading}
        if self.verdict:
            captions["verdict"] = self.verdict
        return {**captions, "rows": self.table.describe()}


@functools.cache
def _described(package: str) -> dict[str, Any]:
    return tomllib.loads((files(package) / "figures.toml").read_text(encoding="utf-8"))
