"""The loss curve of a run, as JSON lines and as a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..reporting.training_record import loss_figure
from ..tensors.document import Facts

CURVE_NAME = "losses.jsonl"
_LOG_NAMES = {
    "loss": "train_loss",
    "eval_loss": "dev_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
}


@dataclass(frozen=True, slots=True)
class LossPoint:
    """What was measured at one optimizer step; None: not measured there."""

    step: int
    train_loss: float | None = None
    dev_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    control_loss: float | None = None  # the dev loss of random neurons

    def to_json(self) -> dict[str, float]:
        """Only what was measured."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def curve_from_log(log: Sequence[Mapping[str, Any]]) -> tuple[LossPoint, ...]:
    """The points of a Trainer's log, by step."""
    points: dict[int, LossPoint] = {}
    for entry in log:
        measured = {ours: entry[theirs] for theirs, ours in _LOG_NAMES.items() if theirs in entry}
        if measured:
            step = int(entry["step"])
            points[step] = dataclasses.replace(points.get(step, LossPoint(step)), **measured)
    return tuple(points[step] for step in sorted(points))


def dev_losses(entry: Mapping[str, Any]) -> dict[str, float]:
    """The dev losses in an entry of a Trainer's log, by set; that of all sets under an empty name."""
    ends = {key: key.removeprefix("eval").removesuffix("loss").strip("_") for key in entry}
    return {
        name: entry[key] for key, name in ends.items() if key.startswith("eval_") and key.endswith("_loss")
    }


def losses_of(points: Sequence[LossPoint], most: int = 200) -> list[LossPoint]:
    """The losses alone, evenly thinned to ``most`` points: dev losses are kept as long as they fit."""
    kept = [
        dataclasses.replace(point, learning_rate=None, gradient_norm=None)
        for point in points
        if point.train_loss is not None or point.dev_loss is not None
    ]
    if len(kept) <= most:
        return kept
    dev = _spaced([point for point in kept if point.dev_loss is not None], most)
    rest = _spaced([point for point in kept if point.dev_loss is None], most - len(dev))
    return sorted([*dev, *rest], key=lambda point: point.step)


def _spaced(points: list[LossPoint], most: int) -> list[LossPoint]:
    """At most ``most`` of the points, evenly spaced from the first to the last."""
    chosen = np.linspace(0, len(points) - 1, min(len(points), max(most, 0)))
    return [points[n] for n in chosen.round().astype(int)]


def write_curve(points: Sequence[LossPoint], path: Path, mode: str = "w") -> None:
    """Write one JSON object per line; with mode ``a``, below what is there."""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(point.to_json()) + "\n" for point in points)


def with_control(points: Sequence[LossPoint], file: Path) -> tuple[LossPoint, ...]:
    """A curve with the dev losses of a control, whose curve `write_curve` has written to ``file``."""
    control = {one["step"]: one.get("dev_loss") for one in map(json.loads, file.read_text().splitlines())}
    merged = {step: LossPoint(step) for step, loss in control.items() if loss is not None}
    merged |= {point.step: point for point in points}
    return tuple(dataclasses.replace(merged[step], control_loss=control.get(step)) for step in sorted(merged))


def plot_curve(points: Sequence[LossPoint], path: Path) -> bool:
    """Plot the losses as a PNG, as a report does; False if there are none or matplotlib is not installed."""
    figure = loss_figure(Facts({"curve": [point.to_json() for point in points]}))
    if figure is None or find_spec("matplotlib") is None:
        return False
    path.write_bytes(figure.png())
    return True
