"""The probe: what tells which neurons matter, where no file does. The base is what is trained afterwards."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, Trainer

from ..checkpoint.opening import open_checkpoint
from ..scoring.scores import Scores
from ..storage.threads import Limits
from ..surgery.diff import DiffPlan
from ..surgery.pairing import pair
from .arguments import arguments
from .gradients import gradient_scores
from .loop import collator, language_model
from .plan import TrainingPlan
from .workplace import Workplace

__all__ = ["STEPS", "probe"]

#: Batches of the gradient probe, or steps of the fine-tune, where the recipe does not say.
STEPS = 100
_SCORES = {"gradients": "gradient", "fisher": "fisher"}


def probe(
    plan: TrainingPlan, place: Workplace, model: Any, args: Any, limits: Limits, say: Callable[[str], None]
) -> Scores:
    """Score the neurons on the training examples; the scores stay in the run's folder.

    Parameters
    ----------
    model:
        The base, live; it is as before afterwards.
    args:
        The Trainer's arguments, which know the device.
    """
    place.scores.unlink(missing_ok=True)
    if plan.recipe.probe.by == "finetune":
        return _finetuned(plan, place, limits, say)
    assert plan.anatomy is not None  # planned for this
    steps = plan.recipe.probe.steps or STEPS
    say(f"scoring neurons by their gradients on {steps} batches")
    model.to(args.device)
    batches = _batches(plan, steps, args.device)
    score = _SCORES[plan.recipe.probe.by]
    scores = gradient_scores(model, plan.base, plan.anatomy, batches, place.scores, score=score)
    plan.base.close()
    return scores


def _batches(plan: TrainingPlan, count: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of examples drawn without repetition, as long as there are some."""
    make, size = collator(plan), plan.recipe.train.batch_size
    order = list(range(len(plan.train)))
    random.Random(plan.recipe.train.seed).shuffle(order)
    for start in range(0, min(len(order), count * size), size):
        batch = make([plan.train[n] for n in order[start : start + size]])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _finetuned(plan: TrainingPlan, place: Workplace, limits: Limits, say: Callable[[str], None]) -> Scores:
    """Fine-tune all of a copy for some steps, score what that changed, and throw it away."""
    import torch

    shutil.rmtree(place.probe, ignore_errors=True)
    recipe = plan.recipe
    steps = recipe.probe.steps or STEPS
    say(f"fine-tuning all of the model for {steps} steps, to see which neurons move")
    model = language_model(plan)
    kind = model.dtype
    model.to(torch.float32)  # steps of a light fine-tune are smaller than the rounding of bfloat16
    args = arguments(
        recipe, place.probe / "trainer", steps=steps, save_every=steps, dev=False,
        learning_rate=recipe.probe.learning_rate, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=plan.train, data_collator=collator(plan))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.to(device="cpu", dtype=kind).save_pretrained(place.probe / "tuned")
    del trainer, model
    tuned = open_checkpoint(place.probe / "tuned")
    sides = pair(plan.base, tuned, recipe.select.scope)
    comparison = DiffPlan(sides, recipe.select.score or "cosine", recipe.select.seed, place.scores)
    scores = comparison.run(limits=limits)
    plan.base.close()
    tuned.close()
    shutil.rmtree(place.probe)
    return scores
