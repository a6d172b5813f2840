"""Planning a training: every error is found before anything is trained or written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import fingerprint
from ..errors import UsageError, boundary, spelled
from ..live.loading import load_tokenizer, meta_model
from ..live.names import live_names
from ..progress import Progress, silent
from ..sources.resolve import is_hub_id
from ..storage.output_checks import refuse_output
from ..storage.threads import Limits
from .examples import Examples, read_examples
from .neuron_choice import NeuronChoice, choose_from_files
from .recipe import Recipe
from .recipe_reader import AnyRecipe, as_key, in_recipe_words, read_recipe
from .run import run_training
from .run_directory import RunDirectory, RunIdentity
from .train import TrainResult
from .trainer import trainer_arguments

__all__ = ["TrainPlan", "plan_train"]

_SAVES = 10  # per run, if the recipe gives no save_every
_ADAM_BYTES = 8  # per parameter: AdamW's two moments in float32


def _never() -> bool:
    return False


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

    def describe(self) -> dict[str, Any]:
        """For JSON, and for ``--dry-run``."""
        selection = self.choice.selection
        return {
            "model": self.recipe.model,
            "parameters": self.base.parameters,
            "probe": self.recipe.probe.by,
            "selected": None if selection is None else selection.neurons,
            "trainable_parameters": self.trainable,
            "estimated": selection is None,
            "optimizer_bytes": None if self.trainable is None else _ADAM_BYTES * self.trainable,
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
        note: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = _never,
    ) -> TrainResult:
        """Train, or resume an unfinished run of the same recipe; errors as in `train`.

        ``note`` gets sentences; ``stop`` is asked after every step: True saves and stops the run.
        """
        return run_training(self, limits=limits or Limits.of(), progress=progress, note=note, stop=stop)


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
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(
            "a recipe is trained by one process",
            hint="to train in several, write a Trainer of your own: docs/training.md",
        )
    asked = read_recipe(recipe, overrides)
    base = Checkpoint.open(asked.model)
    _refuse_out(asked, base, force)
    tokenizer = load_tokenizer(base)
    examples = read_examples(asked, tokenizer)
    directory = RunDirectory.beside(Path(asked.out))
    try:
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
        live_names(meta_model(base, "causal_lm"), choice.tensors)  # refuses names that the live model lacks
    finally:
        base.close()
    steps = asked.train.steps or _steps(asked, len(examples.train))
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


def _steps(recipe: Recipe, examples: int) -> int:
    per_step = recipe.train.batch_size * recipe.train.accumulate
    return max(1, math.ceil(recipe.train.epochs * math.ceil(examples / per_step)))


def _refuse_out(recipe: Recipe, base: Checkpoint, force: bool) -> None:
    named = [recipe.model, recipe.data.train, recipe.data.eval, recipe.probe.path, recipe.select.like]
    inputs = [base.source.path, *(Path(one) for one in named if one is not None and not is_hub_id(one))]
    refuse_output(recipe.out, inputs=inputs, force=force, kind="directory")


def _identity(recipe: Recipe, base: Checkpoint, examples: Examples) -> RunIdentity:
    described = recipe.to_json()
    del described["out"]
    return RunIdentity(described, fingerprint(base), examples.digest())
