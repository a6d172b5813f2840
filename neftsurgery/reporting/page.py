"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from ..errors import UsageError
from ..version import __version__
from .drawing import COLOURS
from .figure import Column, Figure, Table
from .sections import Section

__all__ = ["render"]

#: More rows than these are left to the CSV and JSON.
_ROWS = 300


def render(title: str, sections: Sequence[Section], step: Callable[[int], object] = int) -> str:
    """The page; ``step`` is told of each figure drawn.

    Everything that comes from a file is escaped, and a policy in the page forbids it scripts and network.

    Raises
    ------
    UsageError
        If jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError(
            "the page needs jinja2, which is not installed", hint="pip install 'neftsurgery[report]'"
        ) from error
    folder = files(__package__)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))

    def picture(figure: Figure) -> Markup:
        drawn = Markup(figure.inline_svg())  # escaped by the XML writer that made it
        step(1)
        return drawn

    return template.render(
        title=title,
        sections=sections,
        picture=picture,
        rows=_rows,
        most=_ROWS,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # our own file
        light=[(name, colour) for name, colour, _ in COLOURS],
        dark=[(name, colour) for name, _, colour in COLOURS],
        version=__version__,
    )


def _rows(table: Table) -> list[list[dict[str, Any]]]:
    """The cells of a table's first rows: text, whether it is a number, and the length of its bar."""
    shown = table.rows[:_ROWS]
    longest = [_longest(table, place) if column.bar else 0.0 for place, column in enumerate(table.columns)]
    return [[_cell(*found) for found in zip(table.columns, row, longest, strict=True)] for row in shown]


def _longest(table: Table, place: int) -> float:
    numbers = [abs(cell) for row in table.rows if isinstance(cell := row[place], int | float)]
    return max((number for number in numbers if number == number), default=0.0)


def _cell(column: Column, value: Any, longest: float) -> dict[str, Any]:
    text = "-" if value is None else column.show(value)
    known = isinstance(value, int | float) and value == value
    bar = round(100 * abs(value) / longest, 1) if longest and known else None
    return {"text": text, "number": column.is_number, "bar": bar}
