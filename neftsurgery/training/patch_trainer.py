"""transformers' Trainer for a planned training: it saves patches, reports progress, and stops when asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import MismatchError
from ..tuning.attach import Attached
from ..tuning.trainer import PatchSaving
from .examples import collator

if TYPE_CHECKING:
    from .train_plan import TrainPlan

__all__ = ["PatchTrainer", "make_trainer"]


class PatchTrainer(PatchSaving, Trainer):
    """A Trainer that saves patches."""


def make_trainer(
    plan: TrainPlan,
    attached: Attached,
    args: TrainingArguments,
    *,
    advance: Callable[[int], None],
    note: Callable[[str], None],
    stop: Callable[[], bool],
) -> PatchTrainer:
    """The Trainer of the chosen neurons."""
    trainer = PatchTrainer(
        attached=attached,
        args=args,
        train_dataset=plan.examples.train,
        eval_dataset=plan.examples.dev or None,
        data_collator=collator(plan.tokenizer),
        processing_class=plan.tokenizer,
        callbacks=[_Watch(plan.steps, advance, note, stop)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Watch(TrainerCallback):
    """Reports progress and dev losses, asks whether to stop, and refuses a loss that is not finite."""

    def __init__(
        self,
        steps: int,
        advance: Callable[[int], None],
        note: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        self._steps = steps
        self._advance = advance
        self._note = note
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        self._advance(1)
        if self._stop() and state.global_step < self._steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After each log entry."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise MismatchError(
                f"the loss is not a number at step {state.global_step}",
                found=loss,
                hint="lower train.learning_rate, or check the examples",
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """After each dev loss."""
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            self._note(f"step {state.global_step} of {self._steps}: dev loss {loss:.4f}")
