"""The analysis as figures of a report, and as its section."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..reporting.drawing import ACCENT, CONTRAST, MUTED, SCALE, SURFACE, WIDTH, Canvas, quiet
from ..reporting.figure import Column, Figure, Table
from ..reporting.map_figure import number_cells
from ..reporting.sections import Section
from ..text import amount, label, number, percent
from .result import GROUPS, Group, Utilization

__all__ = ["section_of"]

_EVERY = "all kinds"
_KINDS, _LAYERS = 12, 128
_STATES = {
    "preceding": "states that enter the neuron's block or an earlier one",
    "following": "states that leave the neuron's block or a later one",
    "all": "the states of all layers",
}


def section_of(found: Utilization, title: str, *, end: str = "") -> Section:
    """The analysis as a section of a report.

    Parameters
    ----------
    title:
        Of the section.
    end:
        Appended to the section's and the figures' ids, which are unique in a report.
    """
    facts, text = found.facts, found.facts["text"]
    outside = facts["patch"]["outside"] if "patch" in facts else 0
    limits = ", ".join(amount(limit) for limit in dict.fromkeys(found.limits.values()))
    tiles = (
        ("neurons ranked", amount(found.neurons)),
        ("of them trained", amount(found.groups()["trained"].neurons)),
        *([("trained, not ranked", amount(outside))] if outside else []),
        ("texts", amount(text["texts"])),
        ("tokens", amount(text["tokens"])),
        ("strongly affected: more than", f"{limits} ranks"),
    )
    lead = (
        f"How training moved neurons in the ranking by their largest correlation with hidden states on "
        f"“{label(text['name'])}”: {_STATES[facts['states']]}. After Xu et al., COLING 2025, section "
        "6.1."
    )
    figures = (
        _groups(found, f"use-groups{end}"),
        _buckets(found, f"use-buckets{end}"),
        _map(found, f"use-map{end}"),
    )
    return Section(
        f"utilization{end}", title, lead, tiles, figures, {"kind": "utilization", **found.describe()}
    )


def _groups(found: Utilization, id: str) -> Figure:
    columns = (
        Column("kind", "kind of weight", label),
        Column("group", "neurons", lambda name: name.replace("_", " ")),
        Column("neurons", "how many", amount),
        Column("mean_rank_change", "mean rank change", number),
        Column("mean_share", "of the ranking", percent, bar=True),
    )
    every = found.groups()
    pools = [(_EVERY, every)] * (len(found.kinds) > 1) + [(k, found.groups(kind=k)) for k in found.kinds]
    rows = tuple(
        (kind, name, group.neurons, group.mean_rank_change, group.mean_share)
        for kind, groups in pools
        for name, group in groups.items()
    )
    return Figure(
        id,
        "How far groups of neurons moved",
        "mean rank change, up or down, as a percentage of the neurons ranked together",
        "A bar is how far the neurons of a group moved on average. Strongly affected ones moved further than "
        "the limit; suppressed are those of them that fell, indirectly affected those that were not trained. "
        "The last two overlap.",
        Table(columns, rows),
        lambda canvas: _draw_groups(canvas, every),
        _verdict(every),
    )


def _verdict(groups: dict[str, Group]) -> str:
    strongly, suppressed, indirectly = (groups[name] for name in GROUPS[3:])
    trained, untrained = groups["trained"].mean_share, groups["untrained"].mean_share
    text = ""
    if trained is not None and untrained is not None:
        text = (
            f"Trained neurons moved by {percent(trained)} of the ranking, untrained ones by "
            f"{percent(untrained)}. "
        )
    if not strongly.neurons:
        return f"{text}None is strongly affected."
    return (
        f"{text}{amount(strongly.neurons)} neurons are strongly affected: of these "
        f"{percent(suppressed.neurons / strongly.neurons)} fell, and "
        f"{percent(indirectly.neurons / strongly.neurons)} were not trained."
    )


def _draw_groups(canvas: Canvas, groups: dict[str, Group]) -> None:
    canvas.set_size_inches(WIDTH, 2.2)
    axes = canvas.add_subplot()
    shares = [100 * (group.mean_share or 0) for group in groups.values()]
    colours = [MUTED, ACCENT, MUTED, CONTRAST, CONTRAST, CONTRAST]
    axes.barh(range(len(groups)), shares, color=colours, height=0.62)
    for place, (group, share) in enumerate(zip(groups.values(), shares, strict=True)):
        told = "none" if not group.neurons else f"{percent(share / 100)}, {amount(group.neurons)} neurons"
        axes.annotate(told, (share, place), (5, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(range(len(groups)), [name.replace("_", " ") for name in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.55 * max(*shares, 0.01))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_xlabel("mean rank change, of the neurons ranked together")
    quiet(axes, grid="x")


def _buckets(found: Utilization, id: str) -> Figure:
    columns = (
        Column("from", "from", percent),
        Column("to", "to", percent),
        Column("neurons", "neurons", amount),
        Column("mean_rank_change", "mean rank change", number, bar=True),
    )
    rows = tuple((b.start, b.stop, b.neurons, b.mean_rank_change) for b in found.buckets())
    return Figure(
        id,
        "How far neurons moved, by their place before",
        "mean rank change, in ranks, over the place in the ranking before",
        "From the neurons with the largest correlation on the left to those with the smallest on the right. "
        "In the paper's figure 2 the first ones hardly move, and those in the middle, whose scores lie close "
        "together, move most.",
        Table(columns, rows),
        lambda canvas: _draw_buckets(canvas, rows),
    )


def _draw_buckets(canvas: Canvas, rows: Sequence[tuple[float, float, int, float | None]]) -> None:
    canvas.set_size_inches(WIDTH, 2.7)
    axes = canvas.add_subplot()
    place = np.arange(len(rows))
    moved = np.array([np.nan if mean is None else mean for *_, mean in rows])
    axes.bar(place, moved, width=0.8, color=ACCENT)
    for at, value in zip(place, moved, strict=True):
        if value == value:
            axes.annotate(
                f"{value:,.0f}" if value >= 10 else f"{value:.2g}", (at, value), (0, 3), color=MUTED,
                textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
    axes.set_xticks(np.arange(len(rows) + 1) - 0.5, [f"{100 * start:g}" for start, *_ in rows] + ["100"])
    axes.set_ylim(0, 1.15 * max(float(np.nanmax(moved, initial=0)), 1))
    axes.set_xlabel("percent of the ranking before, the strongest first")
    axes.set_ylabel("mean rank change")
    quiet(axes, grid="y")


def _map(found: Utilization, id: str) -> Figure:
    columns = (
        Column("layer", "layer", label),
        Column("kind", "kind of weight", label),
        *(Column(name, name.replace("_", " "), amount) for name in GROUPS),
        Column("mean_rank_change", "mean rank change", number),
        Column("mean_share", "of the ranking", percent, bar=True),
    )
    cells = {
        (layer, kind): found.groups(layer=layer, kind=kind) for layer in found.layers for kind in found.kinds
    }
    rows = tuple(
        (layer, kind, *(groups[name].neurons for name in GROUPS), all_.mean_rank_change, all_.mean_share)
        for (layer, kind), groups in cells.items()
        if (all_ := groups["all"]).neurons
    )
    share = np.array(
        [[_known(cells[layer, kind]["all"].mean_share) for kind in found.kinds] for layer in found.layers]
    )
    return Figure(
        id,
        "Where neurons moved",
        "mean rank change of all neurons of a weight, as a percentage of the neurons ranked together",
        "A row is a layer, a column a kind of weight. The number is the percentage; the lighter the cell, "
        "the further its neurons moved. Weights in which nothing was trained move as well: what reaches them "
        "has changed, and other neurons have passed theirs.",
        Table(columns, rows),
        lambda canvas: _draw_map(canvas, found, share),
    )


def _known(value: float | None) -> float:
    return np.nan if value is None else value


def _draw_map(
    canvas: Canvas, found: Utilization, share: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> None:
    share = share[:_LAYERS, :_KINDS]
    layers, kinds = share.shape
    canvas.set_size_inches(WIDTH, 1.0 + 0.21 * layers)
    axes = canvas.add_subplot()
    top = float(np.nanmax(share, initial=0.0)) or 1.0
    axes.pcolormesh(
        np.ma.masked_invalid(share), cmap=SCALE, vmin=0, vmax=top, linewidth=1.2, edgecolor=SURFACE
    )
    number_cells(axes, share, top, small=layers > 48)
    axes.set_ylim(layers, 0)
    axes.set_yticks(np.arange(layers) + 0.5, [label(name, 24) for name in found.layers[:layers]])
    names = [label(kind, 28) for kind in found.kinds[:kinds]]
    axes.set_xticks(np.arange(kinds) + 0.5, names, rotation=35, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
