"""The run of a planned training: probe, choose, train the chosen neurons from the base, cut the patch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml

from ..live.loading import load_model, without_progress_bars
from ..progress import Progress
from ..selection.selection import Selection
from ..storage.output import staged_directory
from ..storage.threads import Limits
from ..tuning.attached import Attached, attach
from ..tuning.trainer import PATCH_NAME, last_save
from .gradient_probe import probe
from .loss_curve import TrainingFacts, curve_from_log, losses_of, plot_curve, write_curve
from .neuron_choice import budget_of
from .train import TrainResult
from .trainer import make_trainer

if TYPE_CHECKING:
    from .train_plan import TrainPlan

__all__ = ["run_training"]


def run_training(
    plan: TrainPlan,
    *,
    limits: Limits,
    progress: Progress,
    note: Callable[[str], None],
    stop: Callable[[], bool],
) -> TrainResult:
    """Run a planned training, or resume it; see `TrainPlan.run`."""
    start = time.perf_counter()
    directory = plan.run_directory
    with directory.opened(plan.identity, restart=plan.restart), _quiet_transformers():
        save = last_save(directory.saves)
        args = plan.trainer_arguments(directory.saves, eval_on_start=bool(plan.examples.dev) and save is None)
        model = load_model(plan.base, "causal_lm")
        selection = directory.load_selection()
        if selection is None:
            selection = _choose(plan, model, args.device, limits, note)
        with attach(model, selection, base=plan.recipe.model, mode=plan.recipe.train.mode) as attached:
            with progress("training", plan.steps) as advance:
                resumed_from = directory.last_step
                advance(resumed_from)
                trainer = make_trainer(plan, attached, args, advance=advance, note=note, stop=stop)
                trainer.train(resume_from_checkpoint=None if save is None else str(save))
            result = _result(plan, trainer.state, resumed_from, selection)
            if not result.finished:
                return result
            result = _publish(plan, attached, result, time.perf_counter() - start)
        directory.remove()
    return result


def _result(plan: TrainPlan, state: Any, resumed_from: int, selection: Selection) -> TrainResult:
    curve, dev = curve_from_log(state.log_history), bool(plan.examples.dev)
    return TrainResult(
        out=plan.out,
        run_directory=plan.run_directory.path,
        step=state.global_step,
        steps=plan.steps,
        resumed_from=resumed_from,
        selection=selection,
        curve=curve,
        train_loss=next((p.train_loss for p in reversed(curve) if p.train_loss is not None), None),
        dev_loss=state.best_metric if dev else None,
        best_step=state.best_global_step if dev else None,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' own messages and progress bars."""
    logging: Any = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(level)


def _choose(
    plan: TrainPlan,
    model: Any,
    device: torch.device,
    limits: Limits,
    note: Callable[[str], None],
) -> Selection:
    """Choose the neurons, and keep them in the run directory."""
    selection, scores, directory = plan.choice.selection, plan.choice.scores, plan.run_directory
    if selection is None:
        with probe(plan, model, device, limits=limits, note=note) as probed:
            selection = probed.select(**budget_of(plan.recipe.select))
    elif scores is not None:
        scores.save(directory.scores, force=True)
    selection.require_fit(plan.base)
    selection.save(directory.selection)
    note(f"chose {selection.neurons:,} neurons, {selection.parameters:,} parameters")
    return selection


def _training_facts(plan: TrainPlan, result: TrainResult, seconds: float) -> TrainingFacts:
    options = plan.recipe.to_json()["train"]
    return TrainingFacts(
        data=Path(plan.recipe.data.train).name,
        examples=len(plan.examples.train),
        examples_digest=plan.examples.digest(),
        probe=plan.recipe.probe.by,
        steps=plan.steps,
        options={key: one for key, one in options.items() if key not in ("steps", "epochs", "save_every")},
        train_loss=result.train_loss,
        dev_loss=result.dev_loss,
        best_step=result.best_step,
        curve=tuple(losses_of(result.curve)),
        seconds=round(seconds, 3),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _publish(plan: TrainPlan, attached: Attached, result: TrainResult, seconds: float) -> TrainResult:
    """Write OUT, whole or not at all."""
    facts = {"training": _training_facts(plan, result, seconds).to_json()}
    with staged_directory(plan.out, force=plan.force) as folder:
        with attached.patch(folder / PATCH_NAME, facts=facts) as patch:
            nbytes = patch.nbytes
        result.selection.save(folder / "selection.safetensors")
        if plan.run_directory.scores.exists():
            shutil.copyfile(plan.run_directory.scores, folder / "scores.safetensors")
        write_curve(result.curve, folder / "losses.jsonl")
        recipe = yaml.safe_dump(plan.recipe.to_json(), sort_keys=False)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        plotted = plot_curve(result.curve, folder / "losses.png")
    return replace(result, plotted=plotted, patch_bytes=nbytes)
