"""From a recipe to the arguments of transformers' Trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import UsageError
from .reading import nearest
from .recipe import Recipe

__all__ = ["arguments"]

_LOGS = 100  # points of the loss curve, about
_KEPT = 2  # saves: the last, and the best


def arguments(
    recipe: Recipe, saves: Path, *, steps: int, save_every: int, dev: bool, **options: Any
) -> TrainingArguments:
    """What a Trainer is told; ``options`` beat the recipe's.

    Raises
    ------
    UsageError
        If ``train.more`` names what there is not, or what the recipe has a key for.
    """
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
        "save_total_limit": _KEPT,
        "eval_strategy": "steps" if dev else "no",
        "eval_steps": save_every,
        "load_best_model_at_end": dev,
        "metric_for_best_model": "eval_loss" if dev else None,
        "greater_is_better": False if dev else None,
        "logging_steps": max(1, steps // _LOGS),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": "none",
    }  # fmt: skip
    known = {one.name for one in dataclasses.fields(TrainingArguments) if one.init}
    for name in train.more:
        if name in ours:
            raise UsageError(f"train.more.{name} is the recipe's own to say", hint="see the keys of train")
        if name not in known:
            raise UsageError(f"there is no training argument {name!r}", hint=nearest(name, sorted(known)))
    try:
        pinned = {} if torch.accelerator.is_available() else {"dataloader_pin_memory": False}
        return TrainingArguments(**(ours | pinned | train.more | options))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(
            f"the training arguments do not go together: {error}", hint="see train.more"
        ) from error
