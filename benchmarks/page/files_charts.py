"""The charts of the files suite: throughput of all that compare two checkpoints, and memory by file size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.page.metrics import Group, Run, limit, peak, spread, work

OURS, LIMIT, RIVAL = "#1f6feb", "#57606a", "#d0a215"
COLOURS = {"ours": OURS, "limit": LIMIT, "rival": RIVAL}
WIDTH = 5.5  # inches: the text can still be read where a page is 400 pixels wide
MARKS = ("o", "s", "^", "D", "v")
STYLE: Any = {
    "svg.hashsalt": "neftsurgery",  # the same results make the same file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(parts: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draws the charts that have results. Returns file names and captions."""
    drawn = []
    with mpl.rc_context(STYLE):
        for part, file, caption, chart in (
            (
                "warm",
                "diff-throughput.svg",
                "Throughput of diff, warm, beside the limit and the rivals",
                _rates,
            ),
            ("sizes", "memory.svg", "Peak memory as checkpoints grow", _memory),
        ):
            groups = [group for group in parts.get(part, {}).get("groups", []) if group.get("contestants")]
            if groups:
                save(chart(groups), folder / file)
                drawn.append((file, caption))
    return drawn


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as SVG. The same figure gives the same bytes."""
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height))
    return figure, figure.add_subplot()


def _rates(groups: list[Group]) -> Figure:
    """GB/s of each contestant with its range, fastest on top; the limit is a line."""
    group = groups[0]

    def rate(run: Run) -> float:
        return float(group["bytes"] / work(run) / 1e9)

    rows = [(entry, found) for entry in group["contestants"] if (found := spread(entry, rate))]
    rows.sort(key=lambda row: row[1].median)
    figure, axes = _axes(0.6 + 0.56 * len(rows))
    for place, (entry, found) in enumerate(rows):
        error = [[found.median - found.minimum], [found.maximum - found.median]]
        axes.barh(
            place, found.median, xerr=error, color=COLOURS[entry["role"]], ecolor="#24292f", height=0.45
        )
        above = {"transform": axes.get_yaxis_transform(), "va": "bottom", "fontsize": 9}
        axes.text(0.01, place + 0.24, entry["name"], **above)
        axes.annotate(
            f"{found.median:.3g}", (found.maximum, place), (5, 0), textcoords="offset points", va="center"
        )
    if found := spread(limit(group), rate):
        axes.axvline(found.median, color=LIMIT, linestyle="--", linewidth=1)
    axes.set_yticks([])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"GB/s, {group['label']} in the page cache, without process start and imports")
    return figure


def _memory(groups: list[Group]) -> Figure:
    """Peak megabytes of each of this tool's commands, by bytes per side."""
    figure, axes = _axes(3.6)
    lines: dict[str, list[tuple[str, float]]] = {}
    for group in groups:
        side = group["label"].partition(" a side")[0]
        for entry in group["contestants"]:
            if entry["role"] in ("ours", "plan") and (found := spread(entry, peak)):
                lines.setdefault(entry["name"], []).append((side, found.median / 1e6))
    for (name, points), mark in zip(lines.items(), MARKS, strict=False):
        axes.plot(*zip(*points, strict=True), marker=mark, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes a side")
    axes.set_ylabel("peak resident memory, MB")
    axes.legend(frameon=False, fontsize=9)
    return figure
