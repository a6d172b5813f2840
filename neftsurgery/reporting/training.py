"""What a patch tells of how it was trained: facts, and the loss curve if its manifest holds one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import text
from .drawing import ACCENT, CONTRAST, WIDTH, Canvas, legend_above, quiet
from .figure import Column, Figure, Table

__all__ = ["loss_figure", "training_facts"]

_LOSSES = (("train_loss", "train", "o", ACCENT), ("dev_loss", "dev", "s", CONTRAST))
_FACTS = 40


def training_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the manifest says of the training, as names and values to be shown; any JSON may stand there."""
    training = manifest.get("training")
    if not isinstance(training, dict):
        return []
    plain = {key: value for key, value in training.items() if isinstance(value, str | int | float)}
    return [
        (text.label(key.replace("_", " "), 30), _shown(value)) for key, value in list(plain.items())[:_FACTS]
    ]


def _shown(value: str | int | float) -> str:
    if isinstance(value, bool | str):
        return text.label(str(value), 80)
    return text.amount(value) if isinstance(value, int) and abs(value) < 10**15 else text.number(float(value))


def loss_figure(manifest: Mapping[str, Any], *, id: str = "loss") -> Figure | None:
    """The loss curve that a patch's manifest holds; None if it holds none that can be drawn."""
    training = manifest.get("training")
    found = training.get("curve") if isinstance(training, dict) else None
    points = [point for point in found if _is_point(point)] if isinstance(found, list) else []
    if not points:
        return None
    columns = (
        Column("step", "step", text.amount),
        Column("train_loss", "train loss", text.number),
        Column("dev_loss", "dev loss", text.number),
    )
    rows = tuple((point["step"], _loss(point, "train_loss"), _loss(point, "dev_loss")) for point in points)
    return Figure(
        id,
        "How the loss fell in training",
        "loss over optimizer steps",
        "Circles: on the examples that are trained on; squares: on those held back, where there are any. "
        "Where squares rise while circles fall, the neurons learn the examples by heart.",
        Table(columns, rows),
        lambda canvas: _draw(canvas, points),
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
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if good and math.isfinite(value) else None  # type: ignore[arg-type]


def _draw(canvas: Canvas, points: list[dict[str, Any]]) -> None:
    canvas.set_size_inches(WIDTH, 2.6)
    axes = canvas.add_subplot()
    for key, name, mark, colour in _LOSSES:
        measured = [(p["step"], loss) for p in points if (loss := _loss(p, key)) is not None]
        if measured:
            size = 4 if len(measured) < 60 else 0
            axes.plot(
                *zip(*measured, strict=True),
                color=colour,
                marker=mark,
                markersize=size,
                label=name,
                linewidth=1.5,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    legend_above(axes)
    quiet(axes, grid="y")
