"""The figure of the selection suite: loss on the new task, and loss added on old text, by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.page.files_charts import LIMIT, OURS, RIVAL, STYLE, WIDTH, save
from benchmarks.page.study import Line, Result, Study

# Families of arms: colour, marker, line style, and label. Families of several sizes get a line.
FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "neft": (OURS, "o", "-", "NeFT: sensitive rows"),
    "lora": (RIVAL, "s", "-", "LoRA"),
    "random": ("#cf222e", "X", "", "random rows"),
    "random-like": ("#e8826b", "P", "", "random, as many per tensor"),
    "reversed": ("#24292f", "v", "", "least sensitive rows"),
    "least-like": ("#8c959f", "1", "", "least sensitive, as many per tensor"),
    "norm": ("#8250df", "d", "", "lowest norm"),
    "gradient": ("#1a7f37", "^", "", "gradient signs"),
    "fisher": ("#7ee2a8", "^", "", "squared gradients"),
    "ffn": ("#0a3069", "<", "", "sensitive, ffn"),
    "units": ("#54aeff", ">", "", "sensitive, units"),
    "ffn-random": ("#bf8700", "<", "", "random, ffn"),
    "units-random": ("#d4a72c", ">", "", "random, units"),
    "units-gradient": ("#0550ae", "4", "", "gradient signs, units"),
    "units-fisher": ("#80ccff", "4", "", "squared gradients, units"),
    "linear": (LIMIT, "*", "", "all rows"),
}


def draw(study: Study, file: Path) -> None:
    """Writes the figure as SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, 11.5))
        upper, lower = figure.subplots(2, 1)
        _panel(upper, study, lambda run: float(run["test"]), "held-out loss on the new task, nats per token")
        _panel(lower, study, study.forgotten, "loss added on old text, nats per token")
        handles, labels = upper.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False, fontsize=9)
        figure.subplots_adjust(top=0.79, hspace=0.18)
        save(figure, file)


def _panel(axes: Axes, study: Study, of: Callable[[Line], float], label: str) -> None:
    for name in ("base", "full"):
        if name in study.results:
            style: Any = ":" if name == "base" else "--"
            axes.axhline(
                study.results[name].figure(of).mean, color=LIMIT, linestyle=style, label=_words(name)
            )
    for place, (family, (colour, mark, line, name)) in enumerate(FAMILIES.items()):
        members = [result for result in study.results.values() if _family(result) == family]
        members.sort(key=study.share)
        if not members:
            continue
        # Shift marks of one size, so that they do not hide each other.
        shift = 1 if line or len(members) == 1 else 1 + 0.035 * (place - len(FAMILIES) / 2)
        figures = [result.figure(of) for result in members]
        axes.errorbar(
            [study.share(result) * shift for result in members],
            [figure.mean for figure in figures],
            yerr=[figure.deviation or 0 for figure in figures],
            color=colour, marker=mark, linestyle=line, markersize=6, linewidth=1.3, capsize=2, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.4, 1, 3, 9, 30, 100], ["0.4", "1", "3", "9", "30", "100"])
    axes.minorticks_off()
    axes.set_xlabel("trained parameters, % of all (marks of one size are side by side)")
    axes.set_ylabel(label)


def _family(result: Result) -> str:
    return result.arm.name.removesuffix(f"-{result.arm.percent}")


def _words(name: str) -> str:
    return {"base": "base, untuned", "full": "full fine-tune"}[name]
