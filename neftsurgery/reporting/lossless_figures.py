"""Figures of a lossless patch: how much of each weight changed, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping

from ..patch.lossless import LosslessPatch, form_shares
from ..text import percent
from .figure import ReportFigure
from .layer_map import LayerMap, draw_layer_map

_MOST_COLUMNS = 12  # biases and norms are kinds here, too


def lossless_figures(patch: LosslessPatch, suffix: str) -> tuple[ReportFigure, ...]:
    """A map of what changed, a map of what it takes, and a table by kind of weight."""
    weights = patch.weights()
    kinds = (
        (kind, one.tensors, one.elements, one.changed, one.tuned_bytes, one.code, form_shares(one.forms))
        for kind, one in patch.kinds().items()
    )
    changed = {name: (one.changed, one.elements) for name, one in weights.items()}
    stored = {name: (one.code, one.tuned_bytes) for name, one in weights.items()}
    return (
        _map_figure("changed", suffix, changed, "of all elements changed"),
        _map_figure("stored", suffix, stored, "of the tuned bytes are stored"),
        ReportFigure.of("forms", suffix, kinds),
    )


def _map_figure(name: str, suffix: str, counts: Mapping[str, tuple[int, int]], verdict: str) -> ReportFigure:
    found = LayerMap.of_counts(counts)
    draw = (lambda fig: draw_layer_map(fig, found, _MOST_COLUMNS)) if counts else None
    share = percent(found.neurons / max(1, found.total))
    return ReportFigure.of(name, suffix, found.rows(), draw, f"{share} {verdict}.")
