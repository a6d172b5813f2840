"""Chooses the neurons an arm trains, with the tool itself, from the checkpoints of the base and a probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import neftsurgery as ns
from benchmarks.selection.arms import GRADIENT_SCORES, Arm
from neftsurgery import Selection
from neftsurgery.options import Scope
from neftsurgery.surgery.pairing import pair
from neftsurgery.training.gradient_probe import gradient_scores


def choose(
    arm: Arm, base: Path, probe: Path | None, model: Any, batches: Iterable[Mapping[str, Tensor]], seed: int
) -> Selection:
    """The neurons that ``arm`` trains.

    Parameters
    ----------
    base, probe:
        Checkpoints. The probe is the full fine-tune of the same seed. Without one (None) only random neurons
        can be chosen.
    model, batches:
        The live base and examples, for gradient scores.
    seed:
        The seed of random choices.
    """
    if arm.score in GRADIENT_SCORES:
        checkpoint = ns.Checkpoint.open(base)
        anatomy = pair(checkpoint, checkpoint, Scope(arm.anatomy)).anatomy
        scores = gradient_scores(model, checkpoint, anatomy, batches, score=arm.score)
        checkpoint.close()
    else:
        scores = ns.diff(base, base if probe is None else probe, anatomy=arm.anatomy, score=arm.score)
    with scores:
        if arm.percent is None:
            return scores.select(neurons="100%")
        size = f"{arm.percent}%"
        if arm.same_counts:
            sensitive = scores.select(params=size)
            return scores.select(like=sensitive, policy=arm.policy, seed=seed)
        return scores.select(params=size, policy=arm.policy, seed=seed)


def describe(selection: Selection) -> dict[str, Any]:
    """The facts stored about a selection, as JSON values."""
    facts = {name: round(selection.facts[name], 4) for name in ("captured",) if name in selection.facts}
    where: dict[str, int] = {}
    for name, chosen in selection.tensors.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        where[kind] = where.get(kind, 0) + len(chosen.index)
    return {"neurons": selection.neurons, **facts, "where": where}
