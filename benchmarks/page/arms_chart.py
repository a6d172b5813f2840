"""The figure of the selection suite: loss on the new task, and what was lost on the old text, by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.page.arms import Line, Result, Study
from benchmarks.page.charts import LIMIT, OURS, RIVAL, STYLE, save

# Families of arms: how each is drawn, and what the legend says. Families of several sizes get a line.
FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "neft": (OURS, "o", "-", "NeFT: sensitive rows"),
    "lora": (RIVAL, "s", "-", "LoRA"),
    "random": ("#cf222e", "X", "", "random rows"),
    "random-like": ("#e8826b", "P", "", "random, as many per tensor"),
    "reversed": ("#24292f", "v", "", "least sensitive rows"),
    "least-like": ("#8c959f", "1", "", "least sensitive, as many per tensor"),
    "norm": ("#8250df", "d", "", "lowest norm"),
    "gradient": ("#1a7f37", "^", "", "gradients agree"),
    "fisher": ("#7ee2a8", "^", "", "largest gradients"),
    "ffn": ("#0a3069", "<", "", "sensitive, ffn"),
    "units": ("#54aeff", ">", "", "sensitive, units"),
    "ffn-random": ("#bf8700", "<", "", "random, ffn"),
    "units-random": ("#d4a72c", ">", "", "random, units"),
    "units-gradient": ("#0550ae", "4", "", "gradients agree, units"),
    "units-fisher": ("#80ccff", "4", "", "largest gradients, units"),
    "linear": (LIMIT, "*", "", "all rows"),
}


def draw(study: Study, file: Path) -> None:
    """Writes the figure as SVG."""
    with mpl.rc_context(STYLE):
        figure = Figure((11, 5.2))
        left, right = figure.subplots(1, 2)
        _panel(left, study, lambda run: float(run["test"]), "loss on the new task, held out, nats a token")
        _panel(right, study, study.forgotten, "loss added on old text, nats a token")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=8.5)
        figure.subplots_adjust(top=0.82, wspace=0.3)
        save(figure, file)


def _panel(axes: Axes, study: Study, of: Callable[[Line], float], label: str) -> None:
    for name in ("base", "full"):
        if name in study.results:
            style: Any = ":" if name == "base" else "--"
            axes.axhline(
                study.results[name].figure(of).mean, color=LIMIT, linestyle=style, label=_words(name)
            )
    for place, (family, (colour, mark, line, words)) in enumerate(FAMILIES.items()):
        members = [result for result in study.results.values() if _family(result) == family]
        members.sort(key=study.share)
        if not members:
            continue
        aside = (
            1 if line or len(members) == 1 else 1 + 0.035 * (place - len(FAMILIES) / 2)
        )  # so that marks do not hide each other
        figures = [result.figure(of) for result in members]
        axes.errorbar(
            [study.share(result) * aside for result in members],
            [figure.mean for figure in figures],
            yerr=[figure.deviation or 0 for figure in figures],
            color=colour, marker=mark, linestyle=line, markersize=6, linewidth=1.3, capsize=2, label=words,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.4, 1, 3, 9, 30, 100], ["0.4", "1", "3", "9", "30", "100"])
    axes.minorticks_off()
    axes.set_xlabel("trained parameters, % of all (marks of one size stand side by side)")
    axes.set_ylabel(label)


def _family(result: Result) -> str:
    return result.arm.name.removesuffix(f"-{result.arm.percent}")


def _words(name: str) -> str:
    return {"base": "base, untuned", "full": "full fine-tune"}[name]
