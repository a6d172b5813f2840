"""The record of a run: its loss curve, as JSON lines and as a plot, and the manifest's ``training``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..reporting.training_record import loss_figure

__all__ = ["LossPoint", "TrainingFacts", "curve_from_log", "losses_of", "plot_curve", "write_curve"]

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

    def to_json(self) -> dict[str, float]:
        """Only what was measured."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LossPoint:
        """The inverse of `to_json`."""
        return cls(**value)


def curve_from_log(log: Sequence[Mapping[str, Any]]) -> tuple[LossPoint, ...]:
    """The points of a Trainer's log, by step."""
    points: dict[int, LossPoint] = {}
    for entry in log:
        measured = {ours: entry[theirs] for theirs, ours in _LOG_NAMES.items() if theirs in entry}
        if measured:
            step = int(entry["step"])
            points[step] = dataclasses.replace(points.get(step, LossPoint(step)), **measured)
    return tuple(points[step] for step in sorted(points))


def losses_of(points: Sequence[LossPoint], most: int = 200) -> list[LossPoint]:
    """The losses alone, evenly thinned to ``most`` points: dev losses are kept as long as they fit."""
    kept = [
        LossPoint(point.step, point.train_loss, point.dev_loss)
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
    if len(points) <= most:
        return points
    if most < 2:
        return points[:most]
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def write_curve(points: Sequence[LossPoint], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(point.to_json()) + "\n" for point in points), encoding="utf-8")


def plot_curve(points: Sequence[LossPoint], path: Path) -> bool:
    """Plot the losses as a PNG, as a report does; False if there are none or matplotlib is not installed."""
    figure = loss_figure({"training": {"curve": [point.to_json() for point in points]}})
    if figure is None or find_spec("matplotlib") is None:
        return False
    path.write_bytes(figure.png())
    return True


@dataclass(frozen=True)
class TrainingFacts:
    """How a patch was trained. There are no paths: they mean nothing on another machine."""

    data: str  # the name of the file or data set
    examples: int  # for training
    examples_digest: str  # of all examples
    probe: str  # `probe.by` of the recipe
    steps: int  # of the optimizer
    options: Mapping[str, Any]  # the other keys of the recipe's section `train`
    train_loss: float | None  # this, `dev_loss` and `best_step` as in `TrainResult`
    dev_loss: float | None
    best_step: int | None
    curve: tuple[LossPoint, ...]  # thinned
    seconds: float  # of the run
    torch: str  # version
    transformers: str  # version

    def to_json(self) -> dict[str, object]:
        """The manifest's ``training``. The options stand beside the rest; a loss that is None is left out."""
        facts: dict[str, Any] = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.name == "options":
                facts |= value
            elif one.name == "curve":
                facts["curve"] = [point.to_json() for point in value]
            elif value is not None:
                facts[one.name] = value
        return facts

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingFacts:
        """The inverse of `to_json`."""
        own = {one.name for one in dataclasses.fields(cls)} - {"options", "curve"}
        known: dict[str, Any] = {name: value.get(name) for name in own}
        return cls(
            **known,
            options={key: one for key, one in value.items() if key not in own | {"curve"}},
            curve=tuple(LossPoint.from_json(point) for point in value.get("curve", ())),
        )
