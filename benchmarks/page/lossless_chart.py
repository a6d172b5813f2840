"""The chart of a longer SFT: how size, entropy and the share of changed elements grow with its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.page.files_charts import OURS, RIVAL, STYLE, save


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Writes the chart as SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure((9, 3.4))
        left, right = figure.subplots(1, 2)
        for line, colour, mark in zip(lines, (OURS, RIVAL), ("o", "s"), strict=False):
            steps = [point["step"] for point in line["points"]]

            def share(key: str, points: list[dict[str, Any]] = line["points"]) -> list[float]:
                return [100 * point[key] / point["bytes"] for point in points]

            rate = f"SFT at {line['rate']:g}"
            left.plot(steps, share("size"), color=colour, marker=mark, label=f"patch, {rate}")
            left.plot(steps, share("entropy"), color=colour, linestyle=":", linewidth=3, label="its entropy")
            changed = [100 * point["changed"] for point in line["points"]]
            right.plot(steps, changed, color=colour, marker=mark, label=rate)
        for axes, label in ((left, "% of the tuned file"), (right, "elements changed, %")):
            axes.set_ylim(bottom=0)
            axes.set_xlabel("steps")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=9)
        figure.subplots_adjust(wspace=0.25)
        save(figure, file)
