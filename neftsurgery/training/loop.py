"""The live model and the Trainer of a planned training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import MismatchError, UsageError
from ..tuning.attached import Attached
from ..tuning.trainer import PatchSaving
from .examples import collate
from .plan import TrainingPlan

__all__ = ["PatchTrainer", "collator", "language_model", "trainer_of"]


class PatchTrainer(PatchSaving, Trainer):
    """transformers' Trainer, saving patches."""


def language_model(plan: TrainingPlan, dtype: Any = "auto") -> Any:
    """The base, live; ``auto``: in the type of its files."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            plan.base.source.path, dtype=dtype, trust_remote_code=False
        )
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"transformers cannot load it: {next(iter(str(error).splitlines()), '')}", file=plan.base.name
        ) from error


def collator(plan: TrainingPlan) -> Callable[[Any], Any]:
    """What makes batches of examples."""
    tokenizer = plan.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return partial(collate, padding=padding or 0)


def trainer_of(
    plan: TrainingPlan,
    attached: Attached,
    args: TrainingArguments,
    *,
    advance: Callable[[int], None],
    say: Callable[[str], None],
    stop: Callable[[], bool],
    fresh: bool,
) -> PatchTrainer:
    """The Trainer of the chosen neurons; a ``fresh`` run measures the base's dev loss first."""
    args.eval_on_start = bool(plan.dev) and fresh
    trainer = PatchTrainer(
        attached=attached,
        args=args,
        train_dataset=plan.train,
        eval_dataset=plan.dev or None,
        data_collator=collator(plan),
        processing_class=plan.tokenizer,
        callbacks=[_Watch(plan.steps, advance, say, stop)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Watch(TrainerCallback):
    """Tells how far it is, and whether to stop."""

    def __init__(
        self, steps: int, advance: Callable[[int], None], say: Callable[[str], None], stop: Callable[[], bool]
    ) -> None:
        self._steps = steps
        self._advance = advance
        self._say = say
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step is done."""
        self._advance(1)
        if self._stop() and state.global_step < self._steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Something was measured."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise MismatchError(
                f"the loss is no number at step {state.global_step}",
                found=loss,
                hint="lower train.learning_rate, or look at the examples",
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """The dev loss was measured."""
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            self._say(f"step {state.global_step} of {self._steps}: dev loss {loss:.4f}")
