"""The training record in a patch's manifest: its settings, and its loss curve if there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import text
from .figure import Column, ReportFigure, Table
from .plotting import ACCENT, CONTRAST, MplFigure, legend_above, new_axes

__all__ = ["loss_figure", "training_facts"]

_LOSSES = (("train_loss", "train", "o", ACCENT), ("dev_loss", "dev", "s", CONTRAST))
_MAX_FACTS = 40


def training_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The training record as printable names and values. The manifest may hold any JSON."""
    training = manifest.get("training")
    if not isinstance(training, dict):
        return []
    plain = {key: value for key, value in training.items() if isinstance(value, str | int | float)}
    return [
        (text.label(key.replace("_", " "), 30), _show(value))
        for key, value in list(plain.items())[:_MAX_FACTS]
    ]


def _show(value: str | int | float) -> str:
    if isinstance(value, bool | str):
        return text.label(str(value), 80)
    return (
        text.commas(value)
        if isinstance(value, int) and abs(value) < 10**15
        else text.four_digits(float(value))
    )


def loss_figure(manifest: Mapping[str, Any], *, id: str = "loss") -> ReportFigure | None:
    """The loss curve in a patch's manifest; None if there is none that can be drawn."""
    training = manifest.get("training")
    found = training.get("curve") if isinstance(training, dict) else None
    points = [point for point in found if _is_point(point)] if isinstance(found, list) else []
    if not points:
        return None
    columns = (
        Column("step", "step", text.commas),
        Column("train_loss", "train loss", text.four_digits),
        Column("dev_loss", "dev loss", text.four_digits),
    )
    rows = tuple((point["step"], _loss(point, "train_loss"), _loss(point, "dev_loss")) for point in points)
    return ReportFigure(
        id,
        "Training loss",
        "loss by optimizer step",
        "Circles show the loss on the training examples. Squares show the loss on held-out examples, if "
        "there are any. If the squares rise while the circles fall, the neurons overfit.",
        Table(columns, rows),
        lambda fig: _draw(fig, points),
    )


def _is_point(point: object) -> bool:
    return (
        isinstance(point, dict)
        and isinstance(point.get("step"), int)
        and 0 <= point["step"] < 1 << 53
        and any(_loss(point, key) is not None for key, *_ in _LOSSES)
    )


def _loss(point: Mapping[str, Any], key: str) -> float | None:
    value = point.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def _draw(fig: MplFigure, points: list[dict[str, Any]]) -> None:
    axes = new_axes(fig, 2.6, grid="y", xlabel="step", ylabel="loss")
    for key, name, mark, colour in _LOSSES:
        measured = [(p["step"], loss) for p in points if (loss := _loss(p, key)) is not None]
        if measured:
            size = 4 if len(measured) < 60 else 0
            style: Any = {"color": colour, "marker": mark, "markersize": size, "linewidth": 1.5}
            axes.plot(*zip(*measured, strict=True), label=name, **style)
    legend_above(axes)
