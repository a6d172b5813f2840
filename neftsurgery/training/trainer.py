"""transformers' Trainer for a planned training, and its arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import MismatchError, UsageError
from ..tuning.attached import Attached
from ..tuning.trainer import PatchSaving
from .examples import collator
from .recipe import Recipe
from .recipe_reader import nearest

if TYPE_CHECKING:
    from .train_plan import TrainPlan


_LOG_POINTS = 100  # about as many points of the loss curve
_KEPT_SAVES = 2  # the last, and the best


def trainer_arguments(
    recipe: Recipe, saves: Path, *, steps: int, save_every: int, dev: bool, **options: Any
) -> TrainingArguments:
    """The Trainer's arguments; ``options`` replace the recipe's, ``train.more`` adds others."""
    train = recipe.train
    ours: dict[str, Any] = {
        "output_dir": str(saves),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule if not train.warmup or train.schedule != "constant"
        else "constant_with_warmup",
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.clip,
        "seed": train.seed,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": _KEPT_SAVES,
        "eval_strategy": "steps" if dev else "no",
        "eval_steps": save_every,
        "load_best_model_at_end": dev,
        "metric_for_best_model": "eval_loss" if dev else None,
        "greater_is_better": False if dev else None,
        "logging_steps": max(1, steps // _LOG_POINTS),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": "none",
    }  # fmt: skip
    known = sorted(one.name for one in dataclasses.fields(TrainingArguments) if one.init)
    for name in train.more:
        if name in ours:
            raise UsageError(
                f"train.more.{name} is set by the recipe", hint="use the recipe's own keys of train"
            )
        if name not in known:
            raise UsageError(f"there is no training argument {name!r}", hint=nearest(name, known))
    pinned = {} if torch.accelerator.is_available() else {"dataloader_pin_memory": False}
    try:
        return TrainingArguments(**(ours | pinned | train.more | options))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(
            f"the training arguments do not go together: {error}", hint="see train.more"
        ) from error


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


@dataclasses.dataclass(frozen=True)
class _Watch(TrainerCallback):
    """Reports progress and dev losses, asks whether to stop, and refuses a loss that is not finite."""

    steps: int
    advance: Callable[[int], None]
    note: Callable[[str], None]
    stop: Callable[[], bool]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        self.advance(1)
        if self.stop() and state.global_step < self.steps:
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
            self.note(f"step {state.global_step} of {self.steps}: dev loss {loss:.4f}")
