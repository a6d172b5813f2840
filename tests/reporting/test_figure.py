"""A figure's table, CSV and JSON."""

from __future__ import annotations

import csv
import io

import neftsurgery as ns
from neftsurgery.reporting.figure import Table


def test_figures_and_json_hold_the_same_numbers(scores):
    """The CSV, the table on the page and the JSON of a figure come from one table."""
    made = ns.report(scores)
    told = made.describe()
    for name, figure in made.figures.items():
        assert isinstance(figure.table, Table)
        rows = list(csv.DictReader(io.StringIO(figure.table.csv())))
        assert len(rows) == len(told["figures"][name]["rows"])
        for row, expected in zip(rows, told["figures"][name]["rows"], strict=True):
            for key, value in expected.items():
                assert row[key] == ("" if value is None else str(value)), (name, key)
