"""A schedule that drops the least changed neurons and regrows others, against torch's own gradients."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from support import raw_read

import neftsurgery as ns
from neftsurgery.live.loading import load_model
from neftsurgery.training.examples import collator
from neftsurgery.training.gradient_probe import drawn
from neftsurgery.training.train_plan import plan_train

WORDS = ("bird", "fish", "lion", "frog", "toad", "wolf", "bear", "deer")


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"shout {word}:", "completion": f" {word.upper()}"} for word in WORDS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return {
        "model": base,
        "out": tmp_path / "run",
        "data": {"train": tmp_path / "data.jsonl", "eval_share": 0.2},
        "probe": {"by": "weights"},
        "select": {"neurons": "5%", "score": "magnitude", "anatomy": "rows"},
        "schedule": {"regrow": 0.5, "regrow_every": 2, "regrow_batches": 2},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 3, "dtype": "float32"},
    }


def stopped_at(step: int) -> Any:
    asked = iter(range(1, 100))
    return lambda: next(asked) >= step


def neurons(selection: ns.Selection) -> set[tuple[str, int]]:
    return {(name, int(n)) for name, one in selection.tensors.items() for n in one.index}


def test_the_least_changed_go_and_the_largest_gradients_come(recipe: dict[str, Any], base: Path) -> None:
    """Stopped after step 2, so the save has what the first regrowth left."""
    fixed = plan_train(recipe, {"schedule.regrow": 0, "out": str(recipe["out"]) + "-fixed"})
    before = fixed.run(stop=stopped_at(2))
    plan = plan_train(recipe)
    after = plan.run(stop=stopped_at(2))
    assert (before.finished, after.finished, after.step) == (False, False, 2)
    first, then = neurons(before.selection), neurons(after.selection)
    assert len(first) == len(then)
    state = load_file(before.run_directory / "saves/checkpoint-2/neuron_state.safetensors")
    model = load_model(plan.base, "causal_lm", dtype="float32")
    changed: dict[tuple[str, int], float] = {}
    for name in before.selection.tensors:
        index, weight = state[f"{name}:index"], model.get_parameter(name).detach()
        norms = (state[name].double() - weight[index].double()).norm(dim=1)
        changed |= {(name, int(n)): float(norm) for n, norm in zip(index, norms, strict=True)}
        weight[index] = state[name]
    share = 0.5 * (1 - 2 / 6)
    order = sorted(first, key=lambda one: changed[one])
    dropped = set(order[: round(share * len(order))])
    assert len(first - then - dropped) <= 1  # the quantile lies between two
    assert min(changed[one] for one in first & then) >= max(changed[one] for one in first - then)
    squares: Counter[tuple[str, int]] = Counter()
    model.requires_grad_(True)
    for batch in drawn(plan, plan.examples.train, 2, 2):
        model.zero_grad()
        model(**collator(plan.tokenizer)(batch)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:  # what is scored
                for n, square in enumerate(parameter.grad.double().square().sum(1)):
                    squares[name, n] += float(square)
    grown = then - first
    assert grown
    others = squares.keys() - first - then
    assert min(squares[one] for one in grown) >= max(squares[one] for one in others) * (1 - 1e-5)


def test_a_run_that_resumes_ends_with_the_same_bytes(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = plan_train(recipe, {"out": str(tmp_path / "whole"), "select.anatomy": "units"}).run()
    halves = {"select.anatomy": "units"}
    assert not plan_train(recipe, halves).run(stop=stopped_at(3)).finished
    resumed = plan_train(recipe, halves, resume=True).run()
    assert resumed.finished
    assert resumed.best_step == whole.best_step
    for name in ("neuron_patch.safetensors", "selection.safetensors"):
        one, other = raw_read(whole.out / name), raw_read(resumed.out / name)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key][1], other[key][1]) for key in one)


def test_a_control_keeps_its_random_neurons(recipe: dict[str, Any]) -> None:
    plan = plan_train(recipe, {"control": "random"})
    assert plan.choice.selection is not None
    assert plan._control(plan.choice.selection).recipe.schedule.regrow == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"select": {"neurons": 5, "score": "magnitude", "with_bias": True}},
            "schedule.regrow does not go with select.with_bias",
        ),
        ({"train": {"mode": "overlay"}}, "schedule.regrow does not go with train.mode"),
        (
            {"probe.by": "selection", "probe.path": "x", "select": {}},
            "schedule.regrow does not go with probe.by",
        ),
    ],
)
def test_what_does_not_go_together(recipe: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ns.UsageError, match=message):
        plan_train(recipe | changes)
