"""Other neurons during training: the least changed are dropped, and those of large gradients grow.

The schedule is SpIEL's (Ansell et al., https://arxiv.org/abs/2401.16405), with neurons in place of elements.
What happens depends on the recipe, the step and the values alone, so a run that resumes goes the same way.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from ..live.weights import from_bytes
from ..neurons.vectors import gather
from ..surgery.pairing import pair
from ..tensors.arrays import Float64Array
from ..tuning.attached import Attached
from .gradient_probe import collated, drawn, gradient_scores, sum_units
from .neuron_choice import budget_of
from .probe_sums import LARGEST
from .trainer import Watcher

if TYPE_CHECKING:
    from .train_plan import TrainPlan


class Regrowth(TrainerCallback):
    """Changes the trained neurons of a run as its ``schedule`` says."""

    def __init__(self, plan: TrainPlan, attached: Attached, watcher: Watcher) -> None:
        self._plan, self._attached, self._watcher = plan, attached, watcher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step, and before a save."""
        schedule, step = self._plan.recipe.schedule, state.global_step
        if step % schedule.regrow_every == 0 and step < state.max_steps:
            dropped = self._regrow(schedule.regrow * (1 - step / state.max_steps), step, args.device)
            self._watcher.note(f"step {step}: {dropped:,} neurons are dropped, and others grow")

    def _regrow(self, share: float, step: int, device: Any) -> int:
        plan, attached, model = self._plan, self._attached, self._attached.model
        select = plan.recipe.select
        with closing(plan.base) as base:
            anatomy, rows = pair(base, base, select.scope).anatomy, attached.state_dict()
            changes = {tensor.info.name: np.zeros((1, tensor.layout.count)) for tensor in anatomy.scored}
            for name, chosen in attached.selection.tensors.items():
                before = from_bytes(gather(base, chosen.info, chosen.layout, chosen.index), chosen.info.dtype)
                change = (rows[name].cpu().double() - before.double()).square().sum(1)
                changes[name][0, chosen.index] = change
            sum_units(anatomy, changes)
            own = {n: (one.index, changes[n][0, one.index]) for n, one in attached.selection.tensors.items()}
            cut = np.quantile(np.concatenate([each for _, each in own.values()]), share)

            def keep(scores: dict[str, Float64Array]) -> None:
                for name, (index, each) in own.items():
                    scores[name][index] = np.where(each > cut, LARGEST, 0)  # the dropped last

            batches = drawn(plan, plan.examples.train, plan.recipe.schedule.regrow_batches, step)
            with attached.disabled(values=True):
                inputs = collated(plan, batches, device)
                grown = gradient_scores(model, base, anatomy, inputs, score="fisher", adjust=keep)
            assert grown is not None  # nothing stops it
            with grown:
                attached.select(grown.select(**budget_of(select)))
        return sum(int((each <= cut).sum()) for _, each in own.values())
