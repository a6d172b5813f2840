"""transformers' Trainer for a planned training, and its arguments."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ..errors import MismatchError, UsageError
from ..progress import Progress, silent
from ..tuning.attached import Attached
from ..tuning.trainer import PatchSaving
from .examples import collator
from .loss_curve import curve_from_log, dev_losses, write_curve
from .recipe import Recipe
from .recipe_reader import nearest

if TYPE_CHECKING:
    from .train_plan import TrainPlan


_LOG_POINTS = 100  # about as many points of the loss curve
_KEPT_SAVES = 2  # the last, and the best


#: The Trainer's arguments that are keys of ``train``, some under another name.
_KEYS = {
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
    "learning_rate": "learning_rate", "optim": "optimizer", "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup", "weight_decay": "weight_decay", "max_grad_norm": "clip", "seed": "seed",
    "logging_steps": "logging_steps",
}  # fmt: skip


def processes() -> int:
    """How many processes a launcher such as ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first_process() -> bool:
    """Whether this is the process of a launcher, or the only one, that writes and speaks."""
    return not int(os.environ.get("RANK") or 0)


def _own_batches(size: int, accumulate: int) -> dict[str, int]:
    """The batches of one process: a step sees as many examples, however many processes there are."""
    count = processes()
    if size % count and accumulate % count:
        raise UsageError(f"{count} processes cannot share batches of {size}", hint="change train.batch_size")
    size, accumulate = (size // count, accumulate) if accumulate % count else (size, accumulate // count)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}


def trainer_arguments(
    recipe: Recipe, saves: Path, *, steps: int, save_every: int, dev: bool, **options: Any
) -> TrainingArguments:
    """The Trainer's arguments; ``options`` replace the recipe's, ``train.more`` adds others."""
    train = recipe.train
    ours: dict[str, Any] = {
        "output_dir": str(saves),
        "max_steps": steps,
        "per_device_eval_batch_size": train.batch_size,
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
        "include_num_input_tokens_seen": "non_padding",  # and so tokens/s
        "report_to": train.report_to or "none",
        "use_cpu": train.device == "cpu",
        "restore_callback_states_from_checkpoint": train.early_stopping is not None,  # its count
    }  # fmt: skip
    ours |= {name: value for name, key in _KEYS.items() if (value := getattr(train, key)) is not None}
    ours |= _own_batches(train.batch_size, train.accumulate)
    if train.warmup and train.scheduler == "constant":
        ours["lr_scheduler_type"] = "constant_with_warmup"
    arguments: type[TrainingArguments] = TrainingArguments
    if train.method == "dpo":
        arguments = _dpo_arguments()
        ours |= {"max_length": recipe.data.max_length, "precompute_ref_log_probs": True, "bf16": False}
        ours["gradient_checkpointing"] = False
        del ours["label_names"]
    known = sorted(one.name for one in dataclasses.fields(arguments) if one.init)
    if train.gradient_checkpointing:  # the new name, or the old one
        ours[f"{'activation' if 'activation_checkpointing' in known else 'gradient'}_checkpointing"] = True
    for name in train.more:
        if name in ours or name in _KEYS:
            hint = f"use train.{_KEYS[name]}" if name in _KEYS else "use the recipe's own keys of train"
            raise UsageError(f"train.more.{name} is set by the recipe", hint=hint)
        if name not in known:
            raise UsageError(f"there is no training argument {name!r}", hint=nearest(name, known))
    pinned = {} if torch.accelerator.is_available() else {"dataloader_pin_memory": False}
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TRL's old names
            args = arguments(**(ours | pinned | train.more | options))
        if args.world_size != processes():
            raise ValueError(f"each of {processes()} processes would train alone: set train.device to cpu")
        for tracker in get_reporting_integration_callbacks(args.report_to):  # type: ignore[no-untyped-call]
            tracker()  # tells whether its package is installed
        return args
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        what = f"the training arguments do not go together: {error}"
        raise UsageError(what, hint="see train.more") from error


def _dpo_arguments() -> type[TrainingArguments]:
    try:
        from trl.trainer.dpo_config import DPOConfig
    except ImportError as error:
        what = "train.method: dpo needs a package that is not installed: trl"
        raise UsageError(what, hint="pip install 'trl>=1.0'") from error
    kind: type[TrainingArguments] = DPOConfig
    return kind


class _DevSets(PatchSaving):
    """A Trainer that also measures the loss over all of its dev sets."""

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's ``evaluate``; of several sets, ``eval_loss`` is the mean over all examples."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None and isinstance(self.eval_dataset, dict):
            sizes: dict[str, int] = {name: len(one) for name, one in self.eval_dataset.items()}  # type: ignore[arg-type]
            total = sum(metrics[f"eval_{name}_loss"] * size for name, size in sizes.items())
            metrics["eval_loss"] = total / sum(sizes.values())
            self.log({"eval_loss": metrics["eval_loss"]})
        return metrics


class PatchTrainer(_DevSets, Trainer):
    """A Trainer that saves patches."""


def _patch_dpo_trainer(**options: Any) -> _DevSets:
    """TRL's DPOTrainer that saves patches. It measures the base first, then holds no second model."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from trl.trainer.dpo_trainer import DPOTrainer

    shown, before = not are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE", "")
    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TRL's old names
            trainer: _DevSets = type("PatchDPOTrainer", (_DevSets, DPOTrainer), {})(**options)
        return trainer
    finally:
        os.environ["TQDM_DISABLE"] = before
        if shown:
            enable_progress_bars()


@dataclasses.dataclass(frozen=True)
class Watcher:
    """Who watches a run: functions that are told how far it is, and may ask it to stop."""

    progress: Progress = silent
    report: Callable[[str, str], None] = lambda where, text: None  # gets where the run is, and its figures
    note: Callable[[str], None] = lambda text: None  # gets sentences
    stop: Callable[[], bool] = lambda: False  # asked after every step: True saves and stops the run

    def of(self, part: str) -> Watcher:
        """The same, told that what it hears is of a part of the run."""
        return dataclasses.replace(
            self,
            report=lambda where, text: self.report(f"{part}, {where}", text),
            note=lambda text: self.note(f"{part}, {text}"),
        )


def make_trainer(
    plan: TrainPlan,
    attached: Attached,
    args: TrainingArguments,
    callback: RunCallback,
) -> _DevSets:
    """The Trainer of the chosen neurons."""
    sets: dict[str, Any] = {"": plan.examples.train, **plan.examples.dev_sets}
    kind: Any = PatchTrainer
    options: dict[str, Any] = {"data_collator": collator(plan.tokenizer)}
    if plan.recipe.train.method == "dpo":
        from datasets import Dataset

        kind, options = _patch_dpo_trainer, {}
        sets = {name: Dataset.from_list([e["preference"] for e in each]) for name, each in sets.items()}
    train, dev = sets.pop(""), sets if len(sets) > 1 else next(iter(sets.values()), None)
    trainer: _DevSets = kind(
        attached=attached,
        args=args,
        train_dataset=train,
        eval_dataset=dev,
        processing_class=plan.tokenizer,
        callbacks=[callback],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    if (patience := plan.recipe.train.early_stopping) is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


class RunCallback(TrainerCallback):
    """Tells a watcher, and a file if there is one, of losses; stops if asked, or if a loss is not finite."""

    def __init__(self, watcher: Watcher, advance: Callable[[int], None], losses: Path | None = None) -> None:
        self._watcher, self._advance, self._losses = watcher, advance, losses
        self.stopped = False  # whether the watcher has stopped the run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the file of losses with those of the save that the run resumes from."""
        if self._losses is not None:
            write_curve(curve_from_log(state.log_history), self._losses)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        self._advance(1)
        asked = torch.tensor(self._watcher.stop(), dtype=torch.int32, device=args.device)
        if processes() > 1:  # all stop if one is asked to
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After each log entry."""
        logs, where = logs or {}, f"step {state.global_step} of {state.max_steps}"
        if (loss := logs.get("loss")) is not None:
            if not math.isfinite(float(loss)):
                what = f"the loss is not a number at step {state.global_step}"
                hint = "lower train.learning_rate, or check the examples"
                raise MismatchError(what, found=loss, hint=hint)
            rate, speed = logs.get("learning_rate", 0.0), logs.get("train_tokens_per_second", 0.0)
            self._watcher.report(where, f"loss {loss:.4f}, lr {rate:.2e}, {speed:,.0f} tokens/s")
        for name, loss in dev_losses(logs).items():
            self._watcher.note(f"{where}: dev loss {loss:.4f}" + (name and f" of {name}"))
        if self._losses is not None:
            write_curve(curve_from_log([{**logs, "step": state.global_step}]), self._losses, "a")
