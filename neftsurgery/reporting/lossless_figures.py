"""Figures of a lossless patch: how much of each weight changed, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping

from ..patch.lossless import LosslessPatch, form_shares
from ..text import commas, percent, size
from .figure import KIND, LAYER, SHARE, Column, ReportFigure, Table
from .layer_map import LayerMap, draw_layer_map

_MOST_COLUMNS = 12  # biases and norms are kinds here, too
_CHANGED, _ELEMENTS = Column("changed", "changed", commas), Column("elements", "elements", commas)
_CODE, _BYTES = Column("code", "patch", size), Column("tuned_bytes", "tuned", size)


def lossless_figures(patch: LosslessPatch, suffix: str) -> tuple[ReportFigure, ...]:
    """A map of what changed, a map of what it takes, and a table by kind of weight."""
    weights = patch.weights()
    kinds = tuple(
        (kind, one.tensors, one.elements, one.changed, one.tuned_bytes, one.code, form_shares(one.forms))
        for kind, one in patch.kinds().items()
    )
    columns = (KIND, Column("tensors", "tensors", commas), _ELEMENTS, _CHANGED, _BYTES, _CODE)
    return (
        _map_figure(
            f"changed{suffix}",
            "How much of each weight changed",
            "elements whose bits differ from the base's, percent of those of that weight",
            "of all elements changed",
            {name: (one.changed, one.elements) for name, one in weights.items()},
            _CHANGED,
            _ELEMENTS,
        ),
        _map_figure(
            f"stored{suffix}",
            "What each weight takes in the patch",
            "bytes in the patch, percent of those in the tuned files",
            "of the tuned bytes are stored",
            {name: (one.code, one.tuned_bytes) for name, one in weights.items()},
            _CODE,
            _BYTES,
        ),
        ReportFigure(
            f"forms{suffix}",
            "How each kind of weight is stored",
            "elements, and how many changed; size in the tuned files and in the patch; shares of the forms",
            "Nothing is stored of a block that is the same. A coded one is stored as differences from the "
            "base, a changed one as positions and bits of changed elements; zstd and raw ones as all bytes.",
            Table((*columns, Column("stored_as", "stored as")), kinds),
        ),
    )


def _map_figure(
    id: str, title: str, units: str, verdict: str, counts: Mapping[str, tuple[int, int]], *columns: Column
) -> ReportFigure:
    found = LayerMap.of_counts(counts)
    return ReportFigure(
        id,
        title,
        units,
        "Each row is a layer, each column a kind of weight (experts are counted together). The number is the "
        "percentage; lighter cells have more. An empty cell means that there is no such weight.",
        Table((LAYER, KIND, *columns, SHARE), tuple(found.rows())),
        (lambda fig: draw_layer_map(fig, found, _MOST_COLUMNS)) if counts else None,
        f"{percent(found.neurons / max(1, found.total))} {verdict}.",
    )
