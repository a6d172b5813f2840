"""Training: the same schedule for every arm. The state with the lowest dev loss is kept."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import neftsurgery as ns
from benchmarks.selection.arms import Arm
from benchmarks.selection.examples import Example, collate, shuffled_batches
from benchmarks.selection.models import losses, parameters_of
from benchmarks.selection.options import Schedule
from neftsurgery import Selection

WARM_UP, CLIP = 0.05, 1.0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class TrainingResult:
    """Dev losses by step; the step with the lowest one; seconds of all steps, and of the median step."""

    dev: dict[int, float]
    best: int
    seconds: float
    step: float

    @property
    def loss(self) -> float:
        """The lowest dev loss."""
        return self.dev[self.best]


def make_trainable(arm: Arm, model: Any, selection: Selection | None, seed: int) -> list[nn.Parameter]:
    """Prepares the model for the arm, and returns the parameters to train."""
    if arm.kind == "full":
        return list(model.requires_grad_(True).parameters())
    if arm.kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        rank = rank_of(arm, model)
        torch.manual_seed(seed)
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR), model)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert selection is not None
    return list(ns.attach(model, selection, base=False).parameters())


def rank_of(arm: Arm, model: Any) -> int:
    """The rank at which adapters come nearest to the arm's share of the model's parameters."""
    assert arm.percent is not None
    linear = (module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR)
    each = sum(module.in_features + module.out_features for module in linear)
    return max(1, round(float(arm.percent) / 100 * parameters_of(model) / each))


def train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    batches: Iterator[list[Example]],
    schedule: Schedule,
    rate: float,
    evaluate: Callable[[], float] | None = None,
    log: Callable[[int, float], object] = lambda step, loss: None,
) -> TrainingResult:
    """Trains. With ``evaluate``, keeps the state for which it returns the least, the start included."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    dev: dict[int, float] = {}
    best, kept = 0, _copy(parameters) if evaluate else []
    if evaluate:
        dev[0] = evaluate()
    times = []
    for step, batch in enumerate(islice(batches, schedule.steps), 1):
        began = time.perf_counter()
        loss = _step(model, parameters, optimizer, batch, rate * rate_factor(step, schedule.steps))
        times.append(time.perf_counter() - began)
        log(step, loss)
        if evaluate and (step % schedule.evaluate_every == 0 or step == schedule.steps):
            dev[step] = evaluate()
            if dev[step] < dev[best]:
                best, kept = step, _copy(parameters)
            if not math.isfinite(dev[step]) or step - best >= schedule.patience * schedule.evaluate_every:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=bool(evaluate)):
            parameter.copy_(value)
    model.eval()
    return TrainingResult(dev, best, sum(times), median(times))


def _step(
    model: Any, parameters: Sequence[nn.Parameter], optimizer: Any, batch: list[Example], rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    loss = losses(model, collate(batch, model.device)).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def rate_factor(step: int, steps: int) -> float:
    """The factor of the learning rate at ``step`` of 1 to ``steps``."""
    return min(step / max(1.0, WARM_UP * steps), (1 - (step - 1) / steps) / (1 - WARM_UP), 1.0)


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def batches_of(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless shuffled batches, by a seed."""
    return shuffled_batches(examples, size, random.Random(seed))
