"""The section of a report that shows a utilization, with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..reporting.figure import ReportFigure
from ..reporting.plotting import ACCENT, CONTRAST, MUTED, MplFigure, annotate, heatmap, new_axes
from ..reporting.sections import ReportSection
from ..text import commas, label, percent
from .result import GROUPS, NeuronGroup, Utilization

_ALL_KINDS = "all kinds"
_MAX_KINDS, _MAX_LAYERS = 12, 128
_figure = partial(ReportFigure.of, package=__package__)
_STATES = {
    "preceding": "those that enter the neuron's block or an earlier one",
    "following": "those that leave the neuron's block or a later one",
    "all": "those of all layers",
}


def utilization_section(found: Utilization, title: str, *, suffix: str = "") -> ReportSection:
    """A utilization as a section; ``suffix`` makes the ids of it and its figures unique in a report."""
    facts, text = found.facts, found.facts["text"]
    unranked = facts["patch"]["outside"] if "patch" in facts else 0
    limits = ", ".join(commas(limit) for limit in dict.fromkeys(found.limits.values()))
    tiles = (
        ("neurons ranked", commas(found.neurons)),
        ("of these trained", commas(found.groups()["trained"].neurons)),
        *([("trained, not ranked", commas(unranked))] if unranked else []),
        ("texts", commas(text["texts"])),
        ("tokens", commas(text["tokens"])),
        ("strongly affected: more than", f"{limits} ranks"),
    )
    lead = (
        "How training moved neurons in the ranking by their largest correlation with hidden states "
        f"({_STATES[facts['states']]}) on “{label(text['name'])}”. The method is that of Xu et al., COLING "
        "2025, section 6.1."
    )
    rows = tuple((b.start, b.stop, b.neurons, b.mean_rank_change) for b in found.buckets())
    figures = (
        _groups(found, suffix),
        _figure("use-buckets", suffix, rows, lambda fig: _draw_buckets(fig, rows)),
        _map(found, suffix),
    )
    return ReportSection(
        f"utilization{suffix}", title, lead, tiles, figures, {"kind": "utilization", **found.describe()}
    )


def _groups(found: Utilization, suffix: str) -> ReportFigure:
    overall = found.groups()
    pools = [(_ALL_KINDS, overall)] * (len(found.kinds) > 1)
    pools += [(kind, found.groups(kind=kind)) for kind in found.kinds]
    rows = (
        (kind, name, group.neurons, group.mean_rank_change, group.mean_share)
        for kind, groups in pools
        for name, group in groups.items()
    )
    return _figure("use-groups", suffix, rows, lambda fig: _draw_groups(fig, overall), _verdict(overall))


def _verdict(groups: dict[str, NeuronGroup]) -> str:
    strongly, suppressed, indirectly = (groups[name].neurons for name in GROUPS[3:])
    trained, untrained = groups["trained"].mean_share, groups["untrained"].mean_share
    moved = ""
    if trained is not None and untrained is not None:
        ranking = f"{percent(trained)} of the ranking, untrained ones by {percent(untrained)}"
        moved = f"Trained neurons moved by {ranking}. "
    if not strongly:
        return f"{moved}No neuron is strongly affected."
    shares = f"{percent(suppressed / strongly)} fell and {percent(indirectly / strongly)} were not trained"
    return f"{moved}{commas(strongly)} neurons are strongly affected. Of these, {shares}."


def _draw_groups(fig: MplFigure, groups: dict[str, NeuronGroup]) -> None:
    axes = new_axes(fig, 2.2, grid="x", xlabel="mean rank change, share of the ranking")
    shares = [100 * (group.mean_share or 0) for group in groups.values()]
    colours = [MUTED, ACCENT, MUTED, CONTRAST, CONTRAST, CONTRAST]
    axes.barh(range(len(groups)), shares, color=colours, height=0.62)
    for y, (group, share) in enumerate(zip(groups.values(), shares, strict=True)):
        text = "none" if not group.neurons else f"{percent(share / 100)}, {commas(group.neurons)} neurons"
        annotate(axes, text, (share, y), (5, 0), va="center", color=MUTED)
    axes.set_yticks(range(len(groups)), [name.replace("_", " ") for name in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.55 * max(*shares, 0.01))
    axes.xaxis.set_major_formatter("{x:g}%")


def _draw_buckets(fig: MplFigure, rows: Sequence[tuple[float, float, int, float | None]]) -> None:
    what = "percent of the ranking before training, largest correlations first"
    axes = new_axes(fig, 2.7, grid="y", xlabel=what, ylabel="mean rank change")
    xs = np.arange(len(rows))
    moved = np.array([mean for *_, mean in rows], np.float64)  # NaN for None
    axes.bar(xs, moved, width=0.8, color=ACCENT)
    for x, value in zip(xs, moved, strict=True):
        if value == value:
            text = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
            annotate(axes, text, (x, value), (0, 3), color=MUTED, ha="center", fontsize=8.5)
    axes.set_xticks(np.arange(len(rows) + 1) - 0.5, [f"{100 * start:g}" for start, *_ in rows] + ["100"])
    axes.set_ylim(0, 1.15 * max(float(np.nanmax(moved, initial=0)), 1))


def _map(found: Utilization, suffix: str) -> ReportFigure:
    cells = {
        (layer, kind): found.groups(layer=layer, kind=kind) for layer in found.layers for kind in found.kinds
    }
    rows = (
        (layer, kind, *(groups[name].neurons for name in GROUPS), all_.mean_rank_change, all_.mean_share)
        for (layer, kind), groups in cells.items()
        if (all_ := groups["all"]).neurons
    )
    share = np.array(
        [[cells[layer, kind]["all"].mean_share for kind in found.kinds] for layer in found.layers], np.float64
    )  # NaN for a cell without neurons
    layers = [label(name, 24) for name in found.layers[:_MAX_LAYERS]]
    kinds = [label(kind, 28) for kind in found.kinds[:_MAX_KINDS]]
    share = share[:_MAX_LAYERS, :_MAX_KINDS]
    return _figure("use-map", suffix, rows, lambda fig: heatmap(fig, share, layers, kinds))
