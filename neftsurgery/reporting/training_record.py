"""The training record in a patch's manifest: its settings, and its loss curve if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import text
from ..tensors.document import Facts
from .figure import ReportFigure
from .plotting import ACCENT, CONTRAST, MUTED, MplFigure, legend_above, new_axes

_LOSSES = (
    ("train_loss", "train", "o", ACCENT),
    ("dev_loss", "dev", "s", CONTRAST),
    ("control_loss", "random control", "^", MUTED),
)
_MAX_FACTS = 40
_LARGEST = 1e300  # that can be drawn


def training_facts(training: Facts) -> list[tuple[str, str]]:
    """The training record as printable names and values. It may hold any JSON."""
    plain = [(key, value) for key, value in training.items() if isinstance(value, str | int | float)]
    return [(text.label(key.replace("_", " "), 30), _show(value)) for key, value in plain[:_MAX_FACTS]]


def _show(value: str | int | float) -> str:
    if isinstance(value, bool | str):
        return text.label(str(value), 80)
    is_count = isinstance(value, int) and abs(value) < 10**15
    return text.commas(int(value)) if is_count else text.four_digits(float(value))


def loss_figure(training: Facts, suffix: str = "") -> ReportFigure | None:
    """The loss curve of a training record; None if there is none that can be drawn."""
    curve = training.get("curve")
    rows = []
    for point in map(Facts.from_json, curve if isinstance(curve, list) else []):
        step, losses = point.get("step"), [_loss(point, key) for key, *_ in _LOSSES]
        if isinstance(step, int) and 0 <= step < 1 << 53 and any(loss is not None for loss in losses):
            rows.append((step, *losses))
    if not rows:
        return None
    controlled = any(row[-1] is not None for row in rows)
    shown = rows if controlled else [row[:-1] for row in rows]
    control = " Triangles show it for as many random neurons." * controlled
    return ReportFigure.of("loss", suffix, shown, lambda fig: _draw(fig, rows), control=control)


def _loss(point: Facts, key: str) -> float | None:
    value = point.number(key)
    return None if value is None or abs(value) >= _LARGEST else float(value)


def _draw(fig: MplFigure, rows: Sequence[tuple[Any, ...]]) -> None:
    axes = new_axes(fig, 2.6, grid="y", xlabel="step", ylabel="loss")
    for column, (_, name, mark, colour) in enumerate(_LOSSES, 1):
        measured = [(row[0], row[column]) for row in rows if row[column] is not None]
        if measured:
            size = 4 if len(measured) < 60 else 0
            style: Any = {"color": colour, "marker": mark, "markersize": size, "linewidth": 1.5}
            axes.plot(*zip(*measured, strict=True), label=name, **style)
    legend_above(axes)
