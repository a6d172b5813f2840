"""The chart of a longer SFT: how size, entropy and the share of changed elements grow with its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.page.files_charts import OURS, RIVAL, STYLE, WIDTH, save


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Writes the chart as SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 6.8))
        upper, lower = figure.subplots(2, 1)
        for line, colour, mark in zip(lines, (OURS, RIVAL), ("o", "s"), strict=False):
            steps = [point["step"] for point in line["points"]]

            def share(key: str, points: list[dict[str, Any]] = line["points"]) -> list[float]:
                return [100 * point[key] / point["bytes"] for point in points]

            rate = f"SFT at {line['rate']:g}"
            upper.plot(steps, share("size"), color=colour, marker=mark, label=f"patch, {rate}")
            upper.plot(steps, share("entropy"), color=colour, linestyle=":", linewidth=3, label="its entropy")
            changed = [100 * point["changed"] for point in line["points"]]
            lower.plot(steps, changed, color=colour, marker=mark, label=rate)
        for axes, label in ((upper, "% of the tuned file"), (lower, "elements changed, %")):
            axes.set_ylim(bottom=0)
            axes.set_xlabel("steps")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=9)
        figure.subplots_adjust(hspace=0.25)
        save(figure, file)
