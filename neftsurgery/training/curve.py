"""The loss curve: what was measured at which step, as lines and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["curve_of", "draw", "losses_of", "write_curve"]

_NAMES = {
    "loss": "train_loss",
    "eval_loss": "dev_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
}


def curve_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of a Trainer's log: ``step``, and of the others what was measured there."""
    points: dict[int, dict[str, Any]] = {}
    for entry in history:
        measured = {ours: entry[theirs] for theirs, ours in _NAMES.items() if theirs in entry}
        if measured:
            points.setdefault(int(entry["step"]), {"step": int(entry["step"])}).update(measured)
    return [points[step] for step in sorted(points)]


def losses_of(points: Sequence[Mapping[str, Any]], most: int = 200) -> list[dict[str, Any]]:
    """The losses alone, of at most so many points: every dev loss if they fit, evenly spaced ones else."""
    kept = [
        {key: point[key] for key in ("step", "train_loss", "dev_loss") if key in point}
        for point in points
        if "train_loss" in point or "dev_loss" in point
    ]
    if len(kept) <= most:
        return kept
    measured = [point for point in kept if "dev_loss" in point]
    rest = [point for point in kept if "dev_loss" not in point]
    chosen = _spaced(measured, most)
    return sorted([*chosen, *_spaced(rest, most - len(chosen))], key=lambda point: int(point["step"]))


def _spaced(points: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of them, from the first to the last."""
    if len(points) <= most:
        return points
    return (
        [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
        if most > 1
        else points[:most]
    )


def write_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw it as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("train_loss", "train"), ("dev_loss", "dev")):
        measured = [(point["step"], point[name]) for point in points if name in point]
        if measured:
            axes.plot(*zip(*measured, strict=True), label=label, marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(path)
    return True
