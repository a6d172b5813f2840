"""Planning a training: everything that can be wrong is found before anything is trained or written."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import TrainingArguments

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.opening import open_checkpoint
from ..errors import MismatchError, UsageError, boundary
from ..neurons.anatomy import Anatomy
from ..progress import Progress, silent
from ..scoring.scores import Scores
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..sources.resolve import is_hub_id
from ..storage.output_checks import refuse_output
from ..storage.threads import Limits
from ..surgery.diff import describe_side
from ..surgery.extract import check_selection, plan_extract
from ..surgery.pairing import pair
from ..tuning.names import live_names
from .arguments import arguments
from .examples import Encoder, Example, read_rows
from .form import Form
from .recipe import Recipe
from .workplace import kept_selection, unfinished

__all__ = ["TrainingPlan", "plan_training"]

_SAVES = 10  # in a run, where the recipe does not say


@dataclass(frozen=True)
class TrainingPlan:
    """A planned training; nothing is trained, and nothing written.

    Attributes
    ----------
    recipe:
        What was asked for.
    base:
        The checkpoint to train.
    tokenizer:
        Its tokenizer.
    train, dev:
        The examples; no ``dev``: no dev loss.
    steps, save_every:
        Optimizer steps of the whole run, and between two saves.
    anatomy:
        What a probe is to score; None where the neurons are chosen.
    selection:
        The neurons, where they are known without a probe of the live model.
    scores:
        What they were chosen by, if that was computed now.
    trainable:
        Parameters to train; without ``selection`` an estimate, None where there is none.
    identity:
        What must be the same for a run to go on.
    resumes:
        The step of the save to go on from; None: there is no unfinished run.
    warnings:
        Sentences for the user.
    """

    recipe: Recipe
    base: Checkpoint
    tokenizer: Any
    train: Sequence[Example]
    dev: Sequence[Example]
    steps: int
    save_every: int
    anatomy: Anatomy | None
    selection: Selection | None
    scores: Scores | None
    trainable: int | None
    identity: Mapping[str, Any]
    resumes: int | None
    warnings: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        """The folder to make."""
        return Path(self.recipe.out)

    def arguments(self, saves: Path) -> TrainingArguments:
        """What the Trainer is told."""
        return arguments(self.recipe, saves, steps=self.steps, save_every=self.save_every, dev=bool(self.dev))

    def describe(self) -> dict[str, Any]:
        """For JSON, and for ``--dry-run``."""
        learned = sum(label >= 0 for example in self.train for label in example["labels"])
        return {
            "model": self.recipe.model,
            "parameters": self.base.parameters,
            "probe": self.recipe.probe.by,
            "selected": None if self.selection is None else self.selection.neurons,
            "trainable_parameters": self.trainable,
            "estimated": self.selection is None,
            "optimizer_bytes": None if self.trainable is None else _ADAM * self.trainable,
            "optimizer_bytes_of_full": _ADAM * self.base.parameters,
            "examples": len(self.train),
            "dev_examples": len(self.dev),
            "tokens": sum(len(example["input_ids"]) for example in self.train),
            "tokens_learned": learned,
            "steps": self.steps,
            "save_every": self.save_every,
            "resumes_from": self.resumes,
            "warnings": list(self.warnings),
        }


_ADAM = 8  # bytes of AdamW's two moments, float32


@boundary
def plan_training(
    recipe: Recipe,
    *,
    force: bool = False,
    restart: bool = False,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> TrainingPlan:
    """Check all that a recipe names, and choose the neurons where files suffice for that.

    Parameters
    ----------
    force:
        Replace the recipe's ``out`` if it exists.
    restart:
        Do not go on with an unfinished run.

    Raises
    ------
    UsageError
        For files that are not there, an ``out`` that exists, or a model or tokenizer that cannot be used.
    MismatchError
        If a selection or scores do not fit the model, or no neuron is chosen.
    CorruptFileError
        For examples that cannot be read, with their line.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(
            "a recipe is trained by one process",
            hint="for several, see docs/training.md: a Trainer of your own",
        )
    base = open_checkpoint(recipe.model)
    _refuse_out(recipe, base, force)
    tokenizer = _tokenizer(base)
    train, dev, warnings = _examples(recipe, tokenizer)
    choice = _Choice()
    try:
        identity = _identity(recipe, base, train, dev)
        resumes = None if restart else unfinished(Path(recipe.out), identity)
        if resumes is not None:
            choice.selection = kept_selection(Path(recipe.out))
        if choice.selection is None:
            choice = _choose(recipe, base, limits or Limits.of(), progress)
        _check_names(base, choice)
    finally:
        base.close()
    per_step = recipe.train.batch_size * recipe.train.accumulate
    steps = recipe.train.steps or max(1, math.ceil(recipe.train.epochs * math.ceil(len(train) / per_step)))
    trainable = _estimate(recipe, base, choice) if choice.selection is None else choice.selection.parameters
    plan = TrainingPlan(
        recipe,
        base,
        tokenizer,
        train,
        dev,
        steps,
        recipe.train.save_every or max(1, math.ceil(steps / _SAVES)),
        choice.anatomy,
        choice.selection,
        choice.scores,
        trainable,
        identity,
        resumes,
        (*warnings, *choice.warnings),
    )
    plan.arguments(plan.out)  # refuses what does not go together
    return plan


def _refuse_out(recipe: Recipe, base: Checkpoint, force: bool) -> None:
    named = [recipe.model, recipe.data.train, recipe.data.eval, recipe.probe.path, recipe.select.like]
    inputs = [base.source.path, *(Path(one) for one in named if one is not None and not is_hub_id(one))]
    refuse_output(recipe.out, inputs=inputs, force=force, kind="directory")


def _tokenizer(base: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    if base.config is None:
        raise UsageError(
            "a model to train is a folder with a config.json",
            file=base.name,
            hint="name the whole checkpoint",
        )
    try:
        return AutoTokenizer.from_pretrained(base.source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            "the model's folder has no tokenizer that can be used",
            file=base.name,
            hint="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        ) from error


def _examples(recipe: Recipe, tokenizer: Any) -> tuple[list[Example], list[Example], list[str]]:
    data = recipe.data
    encoder = Encoder(tokenizer, loss_on=data.loss_on, max_length=data.max_length)
    read = partial(read_rows, subset=data.subset, form=Form.of(data.prompt, data.completion))
    train = encoder.encode(read(data.train, data.split, limit=data.limit))
    dev: list[Example] = []
    if data.eval is not None:
        dev = encoder.encode(read(data.eval, data.eval_split))
    elif held := round(data.eval_share * len(train)):
        order = list(range(len(train)))
        random.Random(recipe.train.seed).shuffle(order)
        dev = [train[n] for n in sorted(order[:held])]
        train = [train[n] for n in sorted(order[held:])]
    warnings = []
    if encoder.cut:
        warnings.append(f"{encoder.cut} examples are longer than data.max_length, and were cut")
    if encoder.dropped:
        warnings.append(f"{encoder.dropped} examples had nothing to learn, and were left out")
    if not dev and data.eval_share:
        warnings.append(
            "there are too few examples to hold any back: there is no dev loss, and no best patch"
        )
    return train, dev, warnings


def _identity(
    recipe: Recipe, base: Checkpoint, train: Sequence[Example], dev: Sequence[Example]
) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    for example in (*train, {"input_ids": [-1], "labels": [-1]}, *dev):
        for ids in (example["input_ids"], example["labels"]):
            digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    described = recipe.describe()
    del described["out"]
    return {"recipe": described, "base": describe_side(base)["fingerprint"], "examples": digest.hexdigest()}


@dataclass
class _Choice:
    anatomy: Anatomy | None = None
    selection: Selection | None = None
    scores: Scores | None = None
    warnings: list[str] = field(default_factory=list)


def _choose(recipe: Recipe, base: Checkpoint, limits: Limits, progress: Progress) -> _Choice:
    """The neurons, or what a probe will have to score to choose them."""
    by, path, select = recipe.probe.by, recipe.probe.path, recipe.select
    if by in ("gradients", "fisher", "finetune"):
        found = pair(base, base, select.scope)
        if select.like is not None:
            Selection.load(select.like)
        return _Choice(found.anatomy, warnings=list(found.anatomy.warnings))
    assert path is not None  # the recipe was checked
    if by == "tuned":
        plan = plan_extract(
            recipe.model, path, scope=select.scope, score=select.score or "cosine",
            budget=budget_of(recipe), limits=limits, progress=progress,
        )  # fmt: skip
        return _Choice(None, plan.selection, plan.scores, list(plan.warnings))
    if by == "scores":
        with Scores.load(path) as scores:
            _require_scored(scores, base, path)
            selection = scores.select(**budget_of(recipe))
    else:
        selection = Selection.load(path)
    check_selection(selection, base)
    return _Choice(selection=selection)


def budget_of(recipe: Recipe) -> dict[str, Any]:
    """What `Scores.select` takes."""
    budget = recipe.select.budget
    return budget | {"like": Selection.load(budget["like"])} if "like" in budget else budget


def _require_scored(scores: Scores, base: Checkpoint, path: str) -> None:
    known = scores.facts.get("base")
    there = known.get("fingerprint") if isinstance(known, dict) else None
    here = describe_side(base)["fingerprint"]
    if there is not None and there != here:
        raise MismatchError("the scores are of another base", file=path, expected=here, found=there)


def _check_names(base: Checkpoint, choice: _Choice) -> None:
    """Raise unless transformers knows the model, and the live one has what is chosen, or may be."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.source.path, trust_remote_code=False)
        with torch.device("meta"):
            model = make.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"transformers cannot make a language model of it: {next(iter(str(error).splitlines()), '')}",
            file=base.name,
        ) from error
    if choice.selection is not None:
        live_names(model, choice.selection.tensors)
    elif choice.anatomy is not None:
        live_names(model, [tensor.info.name for tensor in choice.anatomy.scored])


def _estimate(recipe: Recipe, base: Checkpoint, choice: _Choice) -> int | None:
    """About how many parameters a probe's selection will have."""
    assert choice.anatomy is not None  # there is no selection yet
    scored = choice.anatomy.scored
    counts = [t.layout.count if t.part is None else t.part.count for t in scored]
    whole = sum(count * t.layout.width for count, t in zip(counts, scored, strict=True))
    budget = recipe.select.budget
    if "like" in budget:
        like = Selection.load(budget["like"]).counts
        return sum(like.get(t.info.name, 0) * t.layout.width for t in scored)
    amounts = Budget.of(**budget)
    for amount, total, each in (
        (amounts.neurons, whole, whole / max(1, choice.anatomy.unit_count or sum(counts))),
        (amounts.params, base.parameters, 1.0),
    ):
        if amount is not None:
            share = amount.percent
            return (
                round(float(share) / 100 * total) if share is not None else round((amount.count or 0) * each)
            )
    return None
