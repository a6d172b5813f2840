"""The Trainer's arguments: what a recipe sets, and what it may add."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import neftsurgery as ns
from neftsurgery.training.recipe_reader import read_recipe
from neftsurgery.training.trainer import trainer_arguments

RECIPE = {"model": "m", "out": "o", "data": {"train": "d.jsonl"}, "select": {"neurons": "3%"}}


def made(tmp_path: Path, train: dict[str, Any], **options: Any) -> Any:
    recipe = read_recipe(RECIPE, {"train": train})
    return trainer_arguments(recipe, tmp_path, **({"steps": 200, "save_every": 20, "dev": True} | options))


def test_a_recipe_sets_them(tmp_path: Path) -> None:
    args = made(
        tmp_path, {"accumulate": 3, "scheduler": "constant", "warmup": 5, "more": {"adam_beta2": 0.98}}
    )
    assert (args.max_steps, args.save_steps, args.gradient_accumulation_steps) == (200, 20, 3)
    assert (args.lr_scheduler_type, args.warmup_steps, args.adam_beta2) == ("constant_with_warmup", 5, 0.98)
    assert (args.load_best_model_at_end, args.save_total_limit, args.logging_steps) == (True, 2, 2)
    assert made(tmp_path, {}, dev=False).load_best_model_at_end is False
    assert made(tmp_path, {}, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("more", "why", "hint"),
    [
        ({"optm": "sgd"}, "there is no training argument 'optm'", "did you mean optim"),
        ({"max_steps": 3}, "train.more.max_steps is set by the recipe", "keys of train"),
        ({"optim": "sgd"}, "train.more.optim is set by the recipe", "use train.optimizer"),
        ({"label_smoothing_factor": "x", "bf16": True, "fp16": True}, "do not go together", "train.more"),
    ],
)
def test_what_does_not_go(tmp_path: Path, more: dict[str, Any], why: str, hint: str) -> None:
    with pytest.raises(ns.UsageError, match=why) as caught:
        made(tmp_path, {"more": more})
    assert hint in str(caught.value.hint)


def test_keys_of_their_own_reach_the_trainer(tmp_path: Path) -> None:
    keys = {
        "optimizer": "adafactor", "scheduler": "cosine_with_restarts", "gradient_checkpointing": True,
        "logging_steps": 7, "device": "cpu", "early_stopping": 2, "clip": 0.5,
    }  # fmt: skip
    args = made(tmp_path, keys)
    assert (args.optim, args.lr_scheduler_type) == ("adafactor", "cosine_with_restarts")
    assert (args.activation_checkpointing, args.logging_steps, args.max_grad_norm) == (True, 7, 0.5)
    assert (args.use_cpu, args.restore_callback_states_from_checkpoint, args.report_to) == (True, True, [])
    with pytest.raises(ns.UsageError, match="no such tracker is not supported"):
        made(tmp_path, {"report_to": ["no such tracker"]})
    if find_spec("wandb") is None:
        with pytest.raises(ns.UsageError, match="requires wandb to be installed"):
            made(tmp_path, {"report_to": ["wandb"]})
    with pytest.raises(ns.UsageError, match=r"adamm'? is not a valid OptimizerNames"):
        made(tmp_path, {"optimizer": "adamm"})
