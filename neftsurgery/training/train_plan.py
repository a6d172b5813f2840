"""Planning a training: every error is found before anything is trained or written."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import TrainingArguments

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import fingerprint
from ..errors import NeftError, UsageError, boundary, spelled
from ..hub.push import push
from ..hub.repository import MAIN, read_repository
from ..live.loading import load_model, load_tokenizer, meta_model, require_quantization, without_progress_bars
from ..live.placement import live_places
from ..patch.patch_file import PATCH_NAME
from ..progress import Progress, silent
from ..selection.selection import Selection
from ..sources.hub_id import is_repo
from ..sources.resolve import is_hub_id
from ..storage.output import staged_directory
from ..storage.output_checks import refuse_output
from ..storage.threads import Limits
from ..tuning.attached import Attached, attach
from ..tuning.trainer import last_save
from .examples import Examples, read_examples, require_separate
from .gradient_probe import probe
from .loss_curve import (
    CURVE_NAME,
    curve_from_log,
    dev_losses,
    losses_of,
    plot_curve,
    with_control,
    write_curve,
)
from .neuron_choice import NeuronChoice, budget_of, choose_from_files, random_control, within_backward
from .recipe import Recipe, as_key
from .recipe_reader import AnyRecipe, in_recipe_words, read_recipe
from .regrowth import Regrowth
from .run_directory import RunDirectory, RunIdentity
from .train import RESULTS, TrainResult
from .trainer import RunCallback, Watcher, is_first_process, make_trainer, processes, trainer_arguments

_SAVES = 10  # per run, if the recipe gives no save_every
#: Keys of ``train`` that the manifest leaves out.
_UNTOLD = ("steps", "epochs", "save_every", "logging_steps", "report_to", "device")
_ADAM_BYTES = 8  # per parameter: AdamW's two moments in float32


@dataclass(frozen=True)
class TrainPlan:
    """A planned training. Nothing is trained and nothing is written yet."""

    recipe: Recipe  # the recipe, overrides included
    base: Checkpoint  # the checkpoint to train
    tokenizer: Any
    examples: Examples
    # Optimizer steps of the whole run, and between two saves.
    steps: int
    save_every: int
    choice: NeuronChoice  # the neurons, or what the probe has to score
    # The number of parameters to train: an estimate until the neurons are chosen; None if there is none.
    trainable: int | None
    identity: RunIdentity  # what an unfinished run must have in common with this one to resume
    resumes: int | None  # the step of the save that the run resumes from; None: there is no unfinished run
    force: bool = False  # whether an existing ``out`` is replaced
    restart: bool = False  # whether an unfinished run is discarded
    warnings: tuple[str, ...] = ()  # sentences for the user

    @property
    def out(self) -> Path:
        """The folder to create."""
        return Path(self.recipe.out)

    @property
    def run_directory(self) -> RunDirectory:
        """The folder of the unfinished run."""
        return RunDirectory.beside(self.out)

    def trainer_arguments(self, saves: Path, **options: Any) -> TrainingArguments:
        """The Trainer's arguments; ``options`` replace the plan's."""
        ours: dict[str, Any] = {
            "steps": self.steps, "save_every": self.save_every, "dev": bool(self.examples.dev)
        }  # fmt: skip
        return trainer_arguments(self.recipe, saves, **(ours | options))

    def load_model(self, *, quantized: bool = True) -> Any:
        """The model with its weights, as the recipe asks for it; ``quantized``: if it asks for that."""
        train = self.recipe.train
        options: dict[str, Any] = {"dtype": train.dtype, "attn_implementation": train.attn_implementation}
        if quantized and train.quantization is not None:
            options["quantization_config"] = dict(train.quantization)
            options["device_map"] = "cpu" if train.device == "cpu" else None
        return load_model(self.base, "causal_lm", **options)

    def describe(self) -> dict[str, Any]:
        """For JSON, and for ``--dry-run``."""
        selection, own = self.choice.selection, self.recipe.train.optimizer is not None
        return {
            "model": self.recipe.model,
            "parameters": self.base.parameters,
            "probe": self.recipe.probe.by,
            "selected": None if selection is None else selection.neurons,
            "trainable_parameters": self.trainable,
            "estimated": selection is None,
            "optimizer_bytes": None if self.trainable is None or own else _ADAM_BYTES * self.trainable,
            "optimizer_bytes_of_full": _ADAM_BYTES * self.base.parameters,
            "examples": len(self.examples.train),
            "dev_examples": len(self.examples.dev),
            "tokens": self.examples.tokens,
            "tokens_learned": self.examples.learned,
            "steps": self.steps,
            "save_every": self.save_every,
            "resumes_from": self.resumes,
            "warnings": list(self.warnings),
        }

    @boundary
    def run(
        self,
        *,
        limits: Limits | None = None,
        progress: Progress = silent,
        report: Callable[[str, str], None] = lambda where, text: None,
        note: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> TrainResult:
        """Train, or resume an unfinished run of the same recipe; errors as in `train`.

        ``report`` gets where the run is and its figures, such as the loss; ``note`` gets sentences; ``stop``
        is asked after every step: True saves and stops the run.
        """
        watcher = Watcher(progress, report, note, stop)
        with _quiet_transformers():
            result = self._run(watcher, limits or Limits.of())
        if self.recipe.push is None or result.patch is None or not is_first_process():
            return result
        try:
            return replace(result, pushed=push(result.patch, self.recipe.push, progress=progress).url)
        except NeftError as error:
            error.hint = f"the patch is written: neftsurgery push {result.patch} {self.recipe.push}"
            raise

    def _run(self, watcher: Watcher, limits: Limits, model: Any = None) -> TrainResult:
        """Train, from the base's live model."""
        start = time.perf_counter()
        directory, mode, skip = self.run_directory, self.recipe.train.mode, self.recipe.train.skip
        args = self.trainer_arguments(directory.saves)
        first = args.process_index == 0
        watcher = watcher if first else Watcher(stop=watcher.stop)
        mode = "overlay" if mode == "auto" and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP")) else mode
        with ExitStack() as stack:
            with args.main_process_first(local=False):  # the others wait until neurons are chosen
                if first:
                    stack.enter_context(directory.opened(self.identity, restart=self.restart))
                save, resumed_from = last_save(directory.saves), directory.last_step
                args.eval_on_start = bool(self.examples.dev) and save is None
                selection = directory.load_selection()
                probes = selection is None and self.choice.selection is None  # it takes plain weights
                model = model or self.load_model(quantized=not probes)
                if self.recipe.data.packing:
                    require_separate(model, self.examples.train)
                selection = selection or (_choose(self, model, args, limits, watcher) if first else None)
            stopped = TrainResult(self.out, directory.path, 0, self.steps, 0, False, Selection({}, {}), ())
            if selection is None:
                return stopped
            if probes and self.recipe.train.quantization is not None:
                del model
                model = self.load_model()
            if self.recipe.control and not directory.control.exists():
                watcher.note("training as many random neurons first, as a control")
                if not self._control(selection)._run(watcher.of("control"), limits, model).finished:
                    return replace(stopped, selection=selection)
            with attach(model, selection, base=self.recipe.model, mode=mode, skip=skip) as attached:
                with watcher.progress("training", self.steps - resumed_from) as advance:
                    callback = RunCallback(watcher, advance, directory.losses if first else None)
                    trainer = make_trainer(self, attached, args, callback)
                    if self.recipe.schedule.regrow:
                        trainer.reselects = True
                        trainer.add_callback(Regrowth(self, attached, watcher))
                    trainer.train(resume_from_checkpoint=None if save is None else str(save))
                finished = not callback.stopped
                result = _result(self, trainer.state, resumed_from, finished, attached.selection)
                if not result.finished:
                    return result
                if not first:  # its shards of the values
                    attached.patch().close()
                    return result
                result = _publish(self, attached, result, time.perf_counter() - start)
            directory.remove()
        return result

    def _control(self, selection: Selection) -> TrainPlan:
        """The plan of the random control. Its OUT lies in the run directory."""
        out, quiet = str(self.run_directory.control), replace(self.recipe.train, report_to=[])
        fixed = replace(self.recipe.schedule, regrow=0.0)
        recipe = replace(self.recipe, control=None, push=None, out=out, train=quiet, schedule=fixed)
        choice = NeuronChoice(random_control(self.recipe, self.base, selection))
        return replace(self, recipe=recipe, choice=choice, resumes=None, force=True)


@boundary
def plan_train(
    recipe: AnyRecipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    restart: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> TrainPlan:
    """Check everything that a recipe names, and choose the neurons if files suffice for that.

    Arguments and errors as in `train`; ``overrides`` as in `read_recipe`.
    """
    if resume and restart:
        raise UsageError("[[resume]] and [[restart]] do not go together")
    asked = read_recipe(recipe, overrides)
    if asked.push is not None and not is_repo(asked.push):
        raise UsageError("push is not the name of a repository", found=asked.push, hint="name it as org/name")
    if asked.push is not None:
        read_repository(asked.push, MAIN)  # not only after hours of training
    if asked.train.quantization is not None:
        require_quantization(asked.train.quantization)
    base = Checkpoint.open(asked.model)
    _refuse_out(asked, base, force)
    tokenizer = load_tokenizer(base)
    examples = read_examples(asked, tokenizer)
    _require_positions(base, examples)
    directory = RunDirectory.beside(Path(asked.out))
    try:
        asked = within_backward(asked, base)
        identity = _identity(asked, base, examples)
        resumes = None if restart else directory.resumable_step(identity)
        if resume and resumes is None:
            raise UsageError("there is no unfinished run to resume", file=asked.out)
        kept = None if resumes is None else directory.load_selection()
        if kept is not None:
            choice = NeuronChoice(kept)
        else:
            with in_recipe_words():
                choice = choose_from_files(asked, base, limits or Limits.of(), progress)
        if choice.selection is None and asked.probe.by == "finetune" and processes() > 1:
            raise UsageError("a probe that fine-tunes runs in one process", hint="set probe.by to gradients")
        if asked.schedule.regrow and processes() > 1:
            raise UsageError("schedule.regrow works in one process")
        if asked.train.skip is None:  # refuses what the live model lacks
            live_places(meta_model(base, "causal_lm"), choice.layouts)
    finally:
        base.close()
    per_epoch = math.ceil(len(examples.train) / (asked.train.batch_size * asked.train.accumulate))
    steps = asked.train.steps or max(1, math.ceil(asked.train.epochs * per_epoch))
    plan = TrainPlan(
        recipe=asked,
        base=base,
        tokenizer=tokenizer,
        examples=examples,
        steps=steps,
        save_every=asked.train.save_every or max(1, math.ceil(steps / _SAVES)),
        choice=choice,
        trainable=choice.parameters(base, asked.select),
        identity=identity,
        resumes=resumes,
        force=force,
        restart=restart,
        warnings=tuple(spelled(warning, as_key) for warning in (*examples.warnings, *choice.warnings)),
    )
    plan.trainer_arguments(plan.out)  # refuses what does not go together
    return plan


def _require_positions(base: Checkpoint, examples: Examples) -> None:
    longest = max(len(one["input_ids"]) for one in examples.train)
    config = base.config or {}
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and longest > positions:
        what = f"an example has {longest:,} tokens, and the model {positions:,} positions"
        raise UsageError(what, file=base.name, hint="lower data.max_length")


def _refuse_out(recipe: Recipe, base: Checkpoint, force: bool) -> None:
    data = recipe.data
    probe = recipe.probe
    named = [recipe.model, *data.names, *data.eval_names, probe.path, probe.against, recipe.select.like]
    inputs = [base.source.path, *(Path(one) for one in named if one is not None and not is_hub_id(one))]
    refuse_output(recipe.out, inputs=inputs, force=force, kind="directory")


def _identity(recipe: Recipe, base: Checkpoint, examples: Examples) -> RunIdentity:
    described = recipe.to_json()
    del described["out"], described["push"]
    return RunIdentity(described, fingerprint(base), examples.digest())


def _result(plan: TrainPlan, state: Any, begun: int, finished: bool, selection: Selection) -> TrainResult:
    curve, dev = curve_from_log(state.log_history), bool(plan.examples.dev)
    if plan.recipe.control is not None and is_first_process():  # it removes the folder
        curve = with_control(curve, plan.run_directory.control / CURVE_NAME)
    best = [dev_losses(entry) for entry in state.log_history if entry["step"] == state.best_global_step]
    return TrainResult(
        out=plan.out,
        run_directory=plan.run_directory.path,
        step=state.global_step,
        steps=plan.steps,
        resumed_from=begun,
        finished=finished,
        selection=selection,
        curve=curve,
        train_loss=next((p.train_loss for p in reversed(curve) if p.train_loss is not None), None),
        dev_loss=state.best_metric if dev else None,
        best_step=state.best_global_step if dev else None,
        dev_losses={name: loss for found in best for name, loss in found.items() if name},
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
    plan: TrainPlan, model: Any, args: TrainingArguments, limits: Limits, watcher: Watcher
) -> Selection | None:
    """Choose the neurons, and keep them in the run directory; None if the probe was stopped."""
    selection, scores, directory = plan.choice.selection, plan.choice.scores, plan.run_directory
    if selection is None:
        probed = probe(plan, model, args.device, limits=limits, watcher=watcher)
        if probed is None:
            return None
        with probed:
            selection = probed.select(**budget_of(plan.recipe.select))
    elif scores is not None:
        scores.save(directory.scores, force=True)
    selection.require_fit(plan.base)
    selection.save(directory.selection)
    directory.probed.unlink(missing_ok=True)
    watcher.note(f"chose {selection.neurons:,} neurons, {selection.parameters:,} parameters")
    return selection


def _training_facts(plan: TrainPlan, result: TrainResult, seconds: float) -> dict[str, object]:
    """The manifest's ``training``: no paths, which mean nothing on another machine; no loss that is None."""
    options = plan.recipe.to_json()["train"]
    facts = {
        "data": ", ".join(Path(name).name for name in plan.recipe.data.names),
        "examples": len(plan.examples.train),
        "examples_digest": plan.examples.digest(),
        "probe": plan.recipe.probe.by,
        "steps": plan.steps,
        **{key: one for key, one in options.items() if key not in _UNTOLD},
        **{name: getattr(result, name) for name in RESULTS},
        "dev_losses": result.dev_losses or None,
        "curve": [point.to_json() for point in losses_of(result.curve)],
        "seconds": round(seconds, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _publish(plan: TrainPlan, attached: Attached, result: TrainResult, seconds: float) -> TrainResult:
    """Write OUT, whole or not at all."""
    facts = {"training": _training_facts(plan, result, seconds)}
    with staged_directory(plan.out, force=plan.force) as folder:
        with attached.patch(folder / PATCH_NAME, facts=facts) as patch:
            nbytes = patch.nbytes
        attached.selection.save(folder / "selection.safetensors")
        if plan.run_directory.scores.exists():
            shutil.copyfile(plan.run_directory.scores, folder / "scores.safetensors")
        if (runs := plan.run_directory.saves / "runs").exists():  # TensorBoard's
            shutil.copytree(runs, folder / "runs")
        if plan.recipe.control is not None:
            ignored = shutil.ignore_patterns("recipe.yaml")  # its names are of the run directory
            shutil.copytree(plan.run_directory.control, folder / "control", ignore=ignored)
        write_curve(result.curve, folder / CURVE_NAME)
        recipe = yaml.safe_dump(plan.recipe.to_json(), sort_keys=False)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        plotted = plot_curve(result.curve, folder / "losses.png")
    return replace(result, plotted=plotted, patch_bytes=nbytes)
