"""Carrying a training out: probe, choose, train the chosen neurons from the base, cut the patch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ..errors import boundary
from ..progress import Progress, silent
from ..selection.selection import Selection
from ..storage.output import staged_directory
from ..storage.threads import Limits
from ..surgery.extract import check_selection
from ..tuning.attach import attach
from ..tuning.attached import Attached
from ..tuning.trainer import PATCH_NAME, last_save
from .curve import curve_of, draw, losses_of, write_curve
from .loop import language_model, trainer_of
from .plan import TrainingPlan, budget_of
from .probe import probe
from .workplace import Workplace, clear, workplace

__all__ = ["Outcome", "train"]


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes
    ----------
    finished:
        Whether all steps were made; otherwise it was asked to stop, and has saved.
    step, steps:
        How far it came.
    resumed_from:
        The step it went on from; 0: it began.
    selection:
        The neurons.
    dev_loss, best_step:
        Of the best patch, which is the one that was kept; None without dev examples.
    train_loss:
        As measured last.
    picture:
        Whether the curve was drawn.
    nbytes:
        Of the patch.
    """

    finished: bool
    step: int
    steps: int
    resumed_from: int
    selection: Selection
    curve: tuple[Mapping[str, Any], ...]
    dev_loss: float | None = None
    best_step: int | None = None
    train_loss: float | None = None
    picture: bool = False
    nbytes: int = 0


def _never() -> bool:
    return False


@boundary
def train(
    plan: TrainingPlan,
    *,
    force: bool = False,
    restart: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = _never,
) -> Outcome:
    """Carry out a planned training; goes on with an unfinished run of the same recipe.

    Parameters
    ----------
    force, restart:
        As they were planned with.
    progress:
        Told of steps.
    say:
        Told of dev losses, and of what comes next.
    stop:
        Asked after every step whether to save and stop there.

    Raises
    ------
    UsageError
        If another process trains there.
    MismatchError
        If the model cannot be trained so, or its loss is no number.
    MachineError
        If something cannot be read or written.
    """
    start = time.perf_counter()
    with workplace(plan.out, plan.identity, restart=restart) as place, _silence():
        args = plan.arguments(place.saves)
        model = language_model(plan)
        selection = _selection(plan, place, model, args, limits or Limits.of(), say)
        with attach(model, selection, base=plan.recipe.model, mode=plan.recipe.train.mode) as attached:
            save = last_save(place.saves)
            resumed = 0 if save is None else int(save.name.rpartition("-")[2])
            with progress("training", plan.steps) as advance:
                advance(resumed)
                trainer = trainer_of(
                    plan, attached, args, advance=advance, say=say, stop=stop, fresh=save is None
                )
                trainer.train(resume_from_checkpoint=None if save is None else str(save))
            outcome = _outcome(plan, trainer.state, resumed, selection)
            if not outcome.finished:
                return outcome
            outcome = _publish(plan, place, attached, outcome, time.perf_counter() - start, force)
        clear(place)
    return outcome


def _outcome(plan: TrainingPlan, state: Any, resumed: int, selection: Selection) -> Outcome:
    curve = tuple(curve_of(state.log_history))
    return Outcome(
        finished=state.global_step >= plan.steps,
        step=state.global_step,
        steps=plan.steps,
        resumed_from=resumed,
        selection=selection,
        curve=curve,
        dev_loss=state.best_metric if plan.dev else None,
        best_step=state.best_global_step if plan.dev else None,
        train_loss=next((p["train_loss"] for p in reversed(curve) if "train_loss" in p), None),
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Have transformers say and draw nothing of its own, for a while."""
    from transformers.utils import logging

    says: Any = logging
    level, bars = says.get_verbosity(), says.is_progress_bar_enabled()
    says.set_verbosity_error()
    says.disable_progress_bar()
    try:
        yield
    finally:
        says.set_verbosity(level)
        if bars:
            says.enable_progress_bar()


def _selection(
    plan: TrainingPlan, place: Workplace, model: Any, args: Any, limits: Limits, say: Callable[[str], None]
) -> Selection:
    """The neurons to train; chosen once, then kept with the run."""
    if place.selection.exists():
        return Selection.load(place.selection)
    if plan.selection is not None:
        selection = plan.selection
        if plan.scores is not None:
            plan.scores.save(place.scores, force=True)
    else:
        with probe(plan, place, model, args, limits, say) as scores:
            selection = scores.select(**budget_of(plan.recipe))
    check_selection(selection, plan.base)
    selection.save(place.selection)
    say(f"chose {selection.neurons:,} neurons, {selection.parameters:,} parameters")
    return selection


def _facts(plan: TrainingPlan, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The manifest's account of the training: no paths, which mean nothing elsewhere."""
    recipe = plan.recipe
    options = recipe.describe()["train"]
    del options["steps"], options["epochs"], options["save_every"]
    losses = {name: getattr(outcome, name) for name in ("train_loss", "dev_loss", "best_step")}
    return {
        "data": Path(recipe.data.train).name,
        "examples": len(plan.train),
        "examples_digest": plan.identity["examples"],
        "probe": recipe.probe.by,
        "steps": plan.steps,
        **options,
        **{name: value for name, value in losses.items() if value is not None},
        "curve": losses_of(outcome.curve),
        "seconds": round(seconds, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _publish(
    plan: TrainingPlan, place: Workplace, attached: Attached, outcome: Outcome, seconds: float, force: bool
) -> Outcome:
    """Make OUT, whole or not at all."""
    facts = {"training": _facts(plan, outcome, seconds)}
    with staged_directory(plan.out, force=force) as folder:
        with attached.patch(folder / PATCH_NAME, facts=facts) as patch:
            nbytes = patch.nbytes
        outcome.selection.save(folder / "selection.safetensors")
        if place.scores.exists():
            shutil.copyfile(place.scores, folder / "scores.safetensors")
        write_curve(outcome.curve, folder / "losses.jsonl")
        described = plan.recipe.describe()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
        picture = draw(outcome.curve, folder / "losses.png")
    return replace(outcome, picture=picture, nbytes=nbytes)
