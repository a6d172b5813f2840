"""How figures are drawn: one style, no global state, pictures that come out the same each time.

matplotlib is imported when something is drawn, not before. Every colour that must differ between a light
and a dark page is one of `COLOURS`; in a page's SVG it becomes a CSS variable, so one picture serves both.
Names from files are never taken for mathematics: ``$`` is a character like any other.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from xml.etree import ElementTree

from .. import text
from ..errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
else:
    Canvas = Any

__all__ = ["ACCENT", "COLOURS", "CONTRAST", "FAINT", "GRID", "INK", "MUTED", "SCALE", "SURFACE", "WIDTH"]
__all__ += [
    "Canvas",
    "Draw",
    "legend_above",
    "log_ticks",
    "png",
    "quiet",
    "require_matplotlib",
    "svg",
    "themed_svg",
]

INK, MUTED, GRID, SURFACE = "#1f2329", "#59636f", "#d5dbe1", "#fffffe"
ACCENT, CONTRAST, FAINT = "#0067a6", "#b3480a", "#b7cbdb"
#: Name of the CSS variable, the colour on a light page, the one on a dark page.
COLOURS = (
    ("ink", INK, "#e6edf3"),
    ("muted", MUTED, "#9aa4af"),
    ("grid", GRID, "#343c45"),
    ("surface", SURFACE, "#11161d"),
    ("accent", ACCENT, "#5ab4ee"),
    ("contrast", CONTRAST, "#f2a65a"),
    ("faint", FAINT, "#34506a"),
)
#: Dark to light in the same order for every kind of colour vision.
SCALE = "cividis"
#: Of every picture, in inches; a page shows it at 576 pixels, or narrower.
WIDTH = 5.0

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.unicode_minus": True,
    "figure.facecolor": SURFACE,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

Draw: TypeAlias = Callable[[Canvas], None]


def require_matplotlib() -> None:
    """Raise a `UsageError` where pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "pictures need matplotlib, which is not installed", hint="pip install 'neftsurgery[report]'"
        ) from error


def png(draw: Draw, *, dpi: int = 200) -> bytes:
    """The picture as PNG, on white."""
    with _drawn(draw) as canvas:
        file = io.BytesIO()
        canvas.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
        return file.getvalue()


def svg(draw: Draw, salt: str) -> str:
    """The picture as an SVG file of its own, on white; its ids are made from ``salt``."""
    with _drawn(draw, {"svg.hashsalt": salt}) as canvas:
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", metadata=nothing)
        return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def themed_svg(text: str, prefix: str, title: str) -> str:
    """An SVG file made fit for a page: ids of its own, CSS variables for colours, a name to read out."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        for child in [c for c in parent if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            parent.remove(child)
    variables = {colour: f"var(--{name})" for name, colour, _ in COLOURS}
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif key == f"{{{_XLINK}}}href":
                del element.attrib[key]
                element.set("href", f"#{prefix}-{value[1:]}" if value.startswith("#") else value)
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
            elif key == "style":
                element.set(key, _themed(value, variables))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str, variables: dict[str, str]) -> str:
    parts = [part.strip().partition(":") for part in style.split(";") if part.strip()]
    kept = [(key, value.strip()) for key, _, value in parts if key != "font-family"]
    return "; ".join(f"{key}: {variables.get(value, value)}" for key, value in kept)


@contextmanager
def _drawn(draw: Draw, style: dict[str, Any] | None = None) -> Iterator[Canvas]:
    """A figure that ``draw`` has drawn on, in our style whatever the user's settings."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        # A glyph that the font lacks is drawn as a box in a PNG; an SVG leaves it to the reader's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        mpl.rcdefaults()
        settings: Any = mpl.rcParams
        settings.update(_STYLE | (style or {}))
        canvas = Figure((WIDTH, 3.0), layout="constrained")
        draw(canvas)
        yield canvas


def quiet(axes: Axes, *, grid: Literal["x", "y", "both"]) -> None:
    """No box around a plot; lines across it along ``grid``."""
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(axis=grid)
    axes.set_axisbelow(True)


def legend_above(axes: Axes) -> None:
    """A legend in one line above the plot, where no curve can run into it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handletextpad=0.5)


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places and labels for an axis of decimal logarithms from ``low`` to ``high``."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first >= 2:
        step = -(-(last - first + 1) // 8)
        whole = range(first, last + 1, step)
        return [float(exponent) for exponent in whole], [text.power(exponent) for exponent in whole]
    steps = (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    values = [factor * 10.0**exponent for exponent in range(first - 1, last + 1) for factor in steps]
    shown = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return [math.log10(value) for value in shown], [f"{value:.4g}" for value in shown]
