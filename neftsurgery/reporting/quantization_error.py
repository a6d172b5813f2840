"""What quantization changed, neuron by neuron: of scores of a quantized checkpoint and its original."""

from __future__ import annotations

import numpy as np

from .. import text
from ..scoring.scores import Scores
from .figure import ReportFigure
from .inputs import MOST_SHOWN
from .layer_map import locate_tensors


def quantization_figures(scores: Scores, suffix: str) -> tuple[ReportFigure, ...]:
    """What quantization cost neurons and weights; empty unless just one side of the scores stores codes."""
    if len(scores.quantized) != 1:
        return ()
    worst, weights = list[tuple[float, int, str, int]](), list[tuple[str, int, float, float]]()
    for batch in scores.batches("base_sq", "delta_sq"):
        with np.errstate(all="ignore"):
            error = np.sqrt(batch.sums["delta_sq"] / batch.sums["base_sq"])
        for tensor, part in zip(batch.tensors, np.split(error, batch.starts[1:]), strict=True):
            if not np.any(part != 0):  # plain numbers on both sides
                continue
            known, name = np.where(np.isfinite(part), part, -1.0), tensor.info.name
            most = np.argsort(-known, kind="stable")[:MOST_SHOWN]
            worst += [(-float(known[n]), len(weights), name, int(n)) for n in most if known[n] >= 0]
            worst = sorted(worst)[:MOST_SHOWN]
            finite = part[np.isfinite(part)]
            middle, top = (float(np.median(finite)), float(finite.max())) if len(finite) else (np.nan, np.nan)
            weights.append((name, len(part), middle, top))
    if not weights:
        return ()
    places = locate_tensors(name for name, *_ in weights)
    rows = [(rank, -size, name, n, *places[name]) for rank, (size, _, name, n) in enumerate(worst, 1)]
    by_weight = [(*places[name], count, middle, top) for name, count, middle, top in weights]
    by_weight.sort(key=lambda row: text.natural_key(f"{row[0]} {row[1]}"))
    return (
        ReportFigure.of("quantization", suffix, rows, shown=MOST_SHOWN),
        ReportFigure.of("quantization-by-weight", suffix, by_weight),
    )
