"""The probe of the live model: it scores neurons on the training examples."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer

from ..checkpoint.checkpoint import Checkpoint
from ..live.loading import load_model
from ..scoring.scores import Scores
from ..storage.threads import Limits
from ..surgery.diff import DiffPlan
from ..surgery.pairing import pair
from .examples import collator
from .gradient_probe import gradient_scores

if TYPE_CHECKING:
    from .train_plan import TrainPlan

__all__ = ["STEPS", "probe"]

#: Batches of a gradient probe, or steps of the fine-tune, if the recipe gives no number.
STEPS = 100
_SCORES = {"gradients": "gradient", "fisher": "fisher"}


def probe(
    plan: TrainPlan,
    model: Any,
    device: torch.device,
    *,
    limits: Limits,
    note: Callable[[str], None],
) -> Scores:
    """Score the neurons on the training examples; the scores file stays in the run directory.

    ``model`` is the live base. A gradient probe moves it to ``device`` and leaves its weights as they are.
    """
    out = plan.run_directory.scores
    out.unlink(missing_ok=True)
    steps = plan.recipe.probe.steps or STEPS
    try:
        if plan.recipe.probe.by == "finetune":
            note(f"fine-tuning the whole model for {steps} steps to see which neurons change")
            return _finetune_scores(plan, steps, limits)
        assert plan.choice.anatomy is not None  # planned for a probe
        note(f"scoring neurons by their gradients on {steps} batches")
        model.to(device)
        score = _SCORES[plan.recipe.probe.by]
        batches = _batches(plan, steps, device)
        return gradient_scores(model, plan.base, plan.choice.anatomy, batches, out, score=score)
    finally:
        plan.base.close()


def _batches(plan: TrainPlan, count: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """At most ``count`` batches; no example is drawn twice."""
    collate, size, examples = collator(plan.tokenizer), plan.recipe.train.batch_size, plan.examples.train
    order = list(range(len(examples)))
    random.Random(plan.recipe.train.seed).shuffle(order)
    for start in range(0, min(len(order), count * size), size):
        batch = collate([examples[n] for n in order[start : start + size]])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _finetune_scores(plan: TrainPlan, steps: int, limits: Limits) -> Scores:
    """Fine-tune a copy of the whole model, score its change, and delete it."""
    recipe, directory = plan.recipe, plan.run_directory
    shutil.rmtree(directory.probe, ignore_errors=True)
    model = load_model(plan.base, "causal_lm")
    dtype = model.dtype
    model.to(torch.float32)  # the steps of a short fine-tune are smaller than the rounding of bfloat16
    args = plan.trainer_arguments(
        directory.probe / "trainer", steps=steps, save_every=steps, dev=False,
        learning_rate=recipe.probe.learning_rate, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    examples = plan.examples.train
    trainer = Trainer(model=model, args=args, train_dataset=examples, data_collator=collator(plan.tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.to(device="cpu", dtype=dtype).save_pretrained(directory.probe / "tuned")
    del trainer, model
    tuned = Checkpoint.open(directory.probe / "tuned")
    sides = pair(plan.base, tuned, recipe.select.scope)
    comparison = DiffPlan(sides, recipe.select.score or "cosine", recipe.select.seed, directory.scores)
    scores = comparison.run(limits=limits)
    tuned.close()
    shutil.rmtree(directory.probe)
    return scores
