"""What quantization changed, neuron by neuron: of scores of a quantized checkpoint and its original."""

from __future__ import annotations

import numpy as np

from .. import text
from ..scoring.scores import Scores
from ..tensors.arrays import Float64Array
from .figure import ReportFigure
from .layer_map import locate_tensors

_SHOWN = 20


def quantization_figures(scores: Scores, suffix: str) -> tuple[ReportFigure, ...]:
    """What quantization cost neurons and weights; empty unless just one side of the scores stores codes."""
    if len(scores.quantized) != 1:
        return ()
    tensors, found = list[str](), list[Float64Array]()
    for batch in scores.batches("base_sq", "delta_sq"):
        with np.errstate(all="ignore"):
            error = np.sqrt(batch.sums["delta_sq"] / batch.sums["base_sq"])
        for tensor, part in zip(batch.tensors, np.split(error, batch.starts[1:]), strict=True):
            if np.any(part != 0):  # the others are plain numbers on both sides
                tensors.append(tensor.info.name)
                found.append(part)
    if not tensors:
        return ()
    places = locate_tensors(tensors)
    every = np.concatenate(found)
    starts = np.cumsum([0, *map(len, found)])
    known = np.where(np.isfinite(every), every, -1.0)
    worst = np.argsort(-known, kind="stable")[:_SHOWN]
    rows = []
    for rank, one in enumerate(worst[known[worst] >= 0].tolist(), 1):
        home = int(np.searchsorted(starts, one, side="right")) - 1
        rows.append((rank, float(every[one]), tensors[home], int(one - starts[home]), *places[tensors[home]]))
    weights = list[tuple[str, str, int, float, float]]()
    for name, errors in zip(tensors, found, strict=True):
        finite = errors[np.isfinite(errors)]
        middle, top = (float(np.median(finite)), float(finite.max())) if len(finite) else (np.nan, np.nan)
        weights.append((*places[name], len(errors), middle, top))
    weights.sort(key=lambda row: text.natural_key(f"{row[0]} {row[1]}"))
    return (
        ReportFigure.of("quantization", suffix, rows, shown=_SHOWN),
        ReportFigure.of("quantization-by-weight", suffix, weights),
    )
