"""Which keys of a recipe go together, and which numbers make sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import UsageError, spelled
from ..options import Scope
from ..selection.budget import Budget
from .prompt_template import PromptTemplate
from .recipe import Probe, Recipe, Select

__all__ = ["check_recipe"]

_POSITIVE = (
    "data.max_length", "data.limit", "probe.steps", "probe.learning_rate", "train.steps", "train.epochs",
    "train.batch_size", "train.accumulate", "train.learning_rate", "train.save_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "train.warmup", "train.weight_decay", "train.clip", "train.seed", "select.seed", "data.eval_share",
)  # fmt: skip


def check_recipe(recipe: Recipe, file: Path | None) -> None:
    """Refuse a recipe that makes no sense; ``file`` is named in errors.

    Raises UsageError for numbers out of range, or keys that do not go together.
    """
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and (value < 0 or (value == 0 and key in _POSITIVE)):
            raise UsageError(f"{key} is too small", file=file, found=value)
    if recipe.data.eval_share >= 1:
        raise UsageError(
            "data.eval_share leaves nothing to train on", file=file, found=recipe.data.eval_share
        )
    PromptTemplate.of(recipe.data.prompt, recipe.data.completion)
    _check_probe(recipe.probe, file)
    _check_select(recipe.select, recipe.probe.by, file)


def _check_probe(probe: Probe, file: Path | None) -> None:
    has_file = probe.by in ("tuned", "scores", "selection")
    if has_file and probe.path is None:
        raise UsageError(f"probe.by {probe.by} needs probe.path", file=file)
    if not has_file and probe.path is not None:
        raise UsageError(f"probe.path does not go with probe.by {probe.by}", file=file)
    if has_file and probe.steps is not None:
        raise UsageError(f"probe.steps does not go with probe.by {probe.by}", file=file)


def _check_select(select: Select, by: str, file: Path | None) -> None:
    keys = dataclasses.fields(Select)
    settled = {  # by the probe or its file
        "gradients": {"score"},
        "fisher": {"score"},
        "scores": {"score", *(one.name for one in dataclasses.fields(Scope))},
        "selection": {one.name for one in keys},
    }.get(by, set())
    for one in keys:
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name in settled and getattr(select, one.name) != default:
            raise UsageError(f"select.{one.name} does not go with probe.by {by}", file=file)
    if by != "selection":
        _check_budget(select, file, units=select.anatomy == "units" and by != "scores")


def _check_budget(select: Select, file: Path | None, *, units: bool) -> None:
    budget = select.budget
    if not budget.keys() & {"neurons", "params", "threshold", "changed", "like"}:
        raise UsageError(
            "the recipe does not say how many neurons to train", file=file, hint="add select.neurons: 3%"
        )
    hint = None
    try:
        checked = Budget.of(**(budget | {"like": {}} if "like" in budget else budget))
        if units:
            hint = "a unit lies in several tensors: say select.anatomy: rows"
            checked.check_units()
    except UsageError as error:
        what, hint = spelled(error.what, _as_key), hint or (error.hint and spelled(error.hint, _as_key))
        raise UsageError(what, file=file, tensor=error.tensor, found=error.found, hint=hint) from None


def _as_key(name: str, value: str | None) -> str:
    """An option of a message as a recipe spells it."""
    return f"select.{name}" if value is None else f"select.{name}: {value}"
