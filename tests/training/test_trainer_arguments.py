"""The Trainer's arguments: what a recipe sets, and what it may add."""

from __future__ import annotations

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
        tmp_path, {"accumulate": 3, "schedule": "constant", "warmup": 5, "more": {"adam_beta2": 0.98}}
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
        ({"optim": "no such"}, "the training arguments do not go together", "train.more"),
    ],
)
def test_what_does_not_go(tmp_path: Path, more: dict[str, Any], why: str, hint: str) -> None:
    with pytest.raises(ns.UsageError, match=why) as caught:
        made(tmp_path, {"more": more})
    assert hint in str(caught.value.hint)
