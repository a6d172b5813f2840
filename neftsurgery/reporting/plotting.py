"""Plotting with matplotlib: one style, no global state, the same bytes each time.

matplotlib is imported when something is drawn, not before. Every colour that differs between a light and a
dark page is one of `COLOURS`. In the SVG of a page it becomes a CSS variable, so that one image serves both.
Names from files are never parsed as mathematics: ``$`` is an ordinary character.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from .. import text
from ..errors import UsageError
from ..version import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = "#1f2329", "#59636f", "#d5dbe1", "#fffffe"
ACCENT, CONTRAST, FAINT = "#0067a6", "#b3480a", "#b7cbdb"
#: The name of the CSS variable, its colour on a light page, its colour on a dark page.
COLOURS = (
    ("ink", INK, "#e6edf3"),
    ("muted", MUTED, "#9aa4af"),
    ("grid", GRID, "#343c45"),
    ("surface", SURFACE, "#11161d"),
    ("accent", ACCENT, "#5ab4ee"),
    ("contrast", CONTRAST, "#f2a65a"),
    ("faint", FAINT, "#34506a"),
)
#: Ordered from dark to light for every kind of colour vision.
COLORMAP = "cividis"
#: The width of every figure, in inches. The page shows it at most 576 pixels wide.
FIGURE_WIDTH = 5.0

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

MplFigure: TypeAlias = "Figure"
DrawFunction: TypeAlias = Callable[[MplFigure], None]


def require_matplotlib() -> None:
    """Raise a `UsageError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        hint = install_command("report")
        raise UsageError("figures need matplotlib, which is not installed", hint=hint)


def png(draw: DrawFunction) -> bytes:
    """The figure as a PNG on white."""
    with _drawn(draw) as fig:
        file = io.BytesIO()
        fig.savefig(file, format="png", dpi=200, metadata={"Software": None})
        return file.getvalue()


def svg(draw: DrawFunction, salt: str) -> str:
    """The figure as a standalone SVG file on white. Its ids are hashed with ``salt``."""
    with _drawn(draw, salt) as fig:
        file = io.StringIO()
        fig.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def themed_svg(text: str, prefix: str, title: str) -> str:
    """An SVG file adapted to a page: unique ids, CSS variables for colours, a label for screen readers."""
    root = ElementTree.fromstring(text)
    for holder in root.iterfind(f".//{{{_SVG}}}style/.."):
        holder.clear()
    for size in ("width", "height"):
        del root.attrib[size]
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for key, value in [*element.attrib.items()]:
            del element.attrib[key]
            named = f"{prefix}-{value}" if key == "id" else re.sub(r"(^|url\()#", rf"\1#{prefix}-", value)
            element.set(key.removeprefix(f"{{{_XLINK}}}"), _themed(named) if key == "style" else named)
    root.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    variables = {colour: f"var(--{name})" for name, colour, _ in COLOURS}
    parts = (part.strip().partition(": ") for part in style.split(";"))
    return "; ".join(
        f"{key}: {variables.get(value, value)}" for key, _, value in parts if key not in ("", "font-family")
    )


@contextmanager
def _drawn(draw: DrawFunction, salt: str | None = None) -> Iterator[MplFigure]:
    """A matplotlib figure drawn by ``draw`` in this module's style, whatever the user's settings are."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        # A PNG shows a glyph that the font lacks as a box. An SVG uses the reader's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        mpl.rc_file(Path(__file__).with_name("figures.mplstyle"))  # on top of matplotlib's defaults
        mpl.rcParams["svg.hashsalt"] = salt
        fig = Figure((FIGURE_WIDTH, 3.0), layout="constrained")
        draw(fig)
        yield fig


def new_axes(
    fig: MplFigure, height: float, *, grid: Literal["x", "y", "both"] | None = None, **labels: Any
) -> Axes:
    """The axes of a figure, ``height`` inches high; with ``grid``, lines of that axis, not a box."""
    fig.set_size_inches(FIGURE_WIDTH, height)
    axes: Axes = fig.add_subplot()
    axes.set(**labels)
    if grid is not None:
        axes.grid(axis=grid)
    return axes


def share_curves(
    fig: MplFigure,
    height: float,
    ticks: Sequence[str],
    curves: Sequence[tuple[str, NDArray[np.float64], str, str]],
    dashed: tuple[str, NDArray[np.float64]],
    **labels: str,
) -> Axes:
    """Draw percentages at ``ticks``: curves with name, mark and colour, and a dashed one to compare with."""
    axes, xs = new_axes(fig, height, grid="y", **labels), np.arange(len(ticks))
    for name, values, mark, colour in curves:
        axes.plot(xs, values, color=colour, marker=mark, markersize=5, linewidth=1.7, label=name)
    axes.plot(xs, dashed[1], color=MUTED, linestyle=(0, (4, 2)), linewidth=1, label=dashed[0])
    axes.set_xticks(xs, ticks)
    axes.set_xlim(-0.6, len(xs) - 0.6)
    axes.yaxis.set_major_formatter("{x:g}%")
    legend_above(axes)
    return axes


def legend_above(axes: Axes) -> None:
    """A legend in one line above the plot, where no curve can overlap it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)


def annotate(axes: Axes, text: str, xy: tuple[Any, Any], offset: tuple[int, int], **style: Any) -> None:
    """Write ``text`` at ``offset`` points from the position ``xy``."""
    axes.annotate(text, xy, offset, textcoords="offset points", **style)


def heatmap(
    fig: MplFigure,
    share: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    top: float | None = None,
    **labels: Any,
) -> Any:
    """Draw shares ``[rows, columns]``, NaN where empty, as cells with percentages; ``top`` is lightest."""
    top = top or float(np.nanmax(share, initial=0.0)) or 1.0
    many, small = len(rows) > 48, len(rows) > 48 or len(columns) > 9
    longest = max(map(len, columns))
    slanted = longest * len(columns) > 60
    height = 0.85 + 0.05 * longest * slanted + max((0.16 if many else 0.23) * len(rows), 0.4)
    axes = new_axes(fig, height, **labels)
    edges: Any = {"linewidth": 1.2, "edgecolor": SURFACE}
    mesh = axes.pcolormesh(np.ma.masked_invalid(share), cmap=COLORMAP, vmin=0, vmax=top, **edges)
    for (row, column), value in np.ndenumerate(share):
        if value == value:
            color = "#101418" if value / top > 0.55 else "#f4f6f8"
            style: Any = {"ha": "center", "va": "center", "fontsize": 8 if small else 9, "color": color}
            axes.text(column + 0.5, row + 0.53, _short_percent(value), **style)
    rotation: Any = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **rotation)
    step = 2 if many else 1  # every other label fits
    axes.set_yticks(np.arange(0, len(rows), step) + 0.5, rows[::step])
    axes.set_ylim(len(rows), 0)
    axes.xaxis.tick_top()
    return mesh


def _short_percent(value: float) -> str:
    """A percentage without its sign, in at most four characters."""
    percent = 100 * value
    if 0 < percent < 0.01:
        return "<.01"
    digits = 2 if 0 < percent < 0.995 else 1 if 0 < percent < 9.95 else 0
    return f"{percent:.{digits}f}"


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Tick positions and labels for an axis of decimal logarithms from ``low`` to ``high``."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first >= 2:
        step = -(-(last - first + 1) // 8)
        whole = range(first, last + 1, step)
        return [float(exponent) for exponent in whole], [text.power_of_ten(exponent) for exponent in whole]
    steps = (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    values = [factor * 10.0**exponent for exponent in range(first - 1, last + 1) for factor in steps]
    shown = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return [math.log10(value) for value in shown], [f"{value:.4g}" for value in shown]
