"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from ..errors import UsageError
from ..version import __version__
from .figure import Column, ReportFigure, Table
from .plotting import COLOURS
from .sections import ReportSection

__all__ = ["render_html"]

#: The page shows this many rows of a table. The CSV and the JSON have all of them.
_MAX_ROWS = 300


def render_html(title: str, sections: Sequence[ReportSection], advance: Callable[[int], None]) -> str:
    """The page as text; ``advance`` is called with 1 after each figure.

    All text from files is escaped. The page's content security policy forbids scripts and network requests.
    Raises UsageError if jinja2 or matplotlib is not installed.
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

    def image(figure: ReportFigure) -> Markup:
        drawn = Markup(figure.inline_svg())  # the XML writer has escaped it
        advance(1)
        return drawn

    return template.render(
        title=title,
        sections=sections,
        image=image,
        rows=_rows,
        max_rows=_MAX_ROWS,
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # a file of this package
        light=[(name, colour) for name, colour, _ in COLOURS],
        dark=[(name, colour) for name, _, colour in COLOURS],
        version=__version__,
    )


def _rows(table: Table) -> list[list[dict[str, Any]]]:
    """The cells of a table's first rows: text, whether it is a number, and the length of its bar."""
    shown = table.rows[:_MAX_ROWS]
    tops = [_largest(table, index) if column.bar else 0.0 for index, column in enumerate(table.columns)]
    return [[_cell(*cell) for cell in zip(table.columns, row, tops, strict=True)] for row in shown]


def _largest(table: Table, index: int) -> float:
    numbers = [abs(cell) for row in table.rows if isinstance(cell := row[index], int | float)]
    return max((number for number in numbers if number == number), default=0.0)


def _cell(column: Column, value: Any, top: float) -> dict[str, Any]:
    text = "-" if value is None else column.show(value)
    known = isinstance(value, int | float) and value == value
    bar = round(100 * abs(value) / top, 1) if top and known else None
    return {"text": text, "number": column.is_number, "bar": bar}
