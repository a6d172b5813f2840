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
    """How a patch was trained. There are no paths: they mean nothing on another machine.

    Attributes
    ----------
    data:
        The name of the file or data set.
    examples, examples_digest:
        The number of training examples, and the hash of all examples.
    probe:
        How the neurons were chosen: ``probe.by`` of the recipe.
    steps:
        Optimizer steps.
    options:
        The other keys of the recipe's section ``train``.
    train_loss, dev_loss, best_step:
        As in `TrainResult`.
    curve:
        The losses, thinned.
    seconds:
        The time that the run took.
    torch, transformers:
        Versions.
    """

    data: str
    examples: int
    examples_digest: str
    probe: str
    steps: int
    options: Mapping[str, Any]
    train_loss: float | None
    dev_loss: float | None
    best_step: int | None
    curve: tuple[LossPoint, ...]
    seconds: float
    torch: str
    transformers: str

    def to_json(self) -> dict[str, Any]:
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
