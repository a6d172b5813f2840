"""Plotting: ticks, and SVG for a page."""

from __future__ import annotations

import re

import numpy as np
import pytest

from neftsurgery.reporting.plotting import COLOURS, heatmap, log_ticks, svg, themed_svg


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (-3.0, 0.0, ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]),
        (-0.1, 1.1, ["1", "2", "5", "10"]),
        (0.0, 0.31, ["1", "1.5", "2"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, labels):
    positions, shown = log_ticks(low, high)
    assert shown == labels
    assert all(low - 1e-6 <= position <= high + 1e-6 for position in positions)


def test_an_svg_for_a_page_has_unique_ids_and_no_fixed_colours():
    def draw(fig):
        fig.add_subplot().set_title("$x_{1$")

    page = themed_svg(svg(draw, "salt"), "prefix", "a <title>")
    assert 'aria-label="a &lt;title&gt;"' in page
    assert 'id="prefix-' in page
    assert "$x_{1$" in page
    assert not [colour for name, colour, _ in COLOURS if name != "surface" and f"fill: {colour}" in page]


@pytest.mark.parametrize("columns", [3, 12])
def test_text_can_be_read_on_a_phone(columns):
    """On a page of 400 pixels, a figure's point is about one pixel."""

    def draw(fig):
        heatmap(fig, np.linspace(0, 1, 60 * columns).reshape(60, -1), ["row"] * 60, ["a_kind"] * columns)

    drawn = svg(draw, "salt")
    assert float(re.search(r'viewBox="0 0 ([\d.]+)', drawn)[1]) <= 368
    assert min(map(float, re.findall(r"font(?:-size)?: ([\d.]+)px", drawn))) >= 8
