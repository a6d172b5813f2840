"""The account of a training that goes into a patch's manifest, under ``training``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .loss_curve import LossPoint

__all__ = ["TrainingFacts"]


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
