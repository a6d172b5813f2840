"""A recipe: what to train on what, and how. `neftsurgery.training.reading` makes one of YAML.

Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ..options import Scope
from ..sources.resolve import is_hub_id

__all__ = ["Data", "Probe", "Recipe", "Select", "Train"]


@dataclass(frozen=True)
class Data:
    """What to learn from.

    Attributes
    ----------
    train, eval:
        A ``.jsonl`` file, or the Hub id of a dataset. Each line, or row, has ``prompt`` and ``completion``,
        or ``messages``, or ``text``.
    prompt, completion:
        For rows of other fields: the two texts, with the fields in braces, as in ``Question: {question}``.
    subset, split, eval_split:
        Of a Hub dataset.
    eval_share:
        The share of ``train`` to hold back for the dev loss where there is no ``eval``; 0: no dev loss.
    loss_on:
        ``completions``: what comes after the prompt, or from the assistant. ``all``: every token.
    max_length:
        Tokens of an example; what is longer is cut.
    limit:
        Use so many examples at most.
    """

    train: str
    eval: str | None = None
    prompt: str | None = None
    completion: str | None = None
    subset: str | None = None
    split: str = "train"
    eval_split: str = "validation"
    eval_share: float = 0.05
    loss_on: Literal["completions", "all"] = "completions"
    max_length: int = 1024
    limit: int | None = None


@dataclass(frozen=True)
class Probe:
    """How to find out which neurons matter.

    Attributes
    ----------
    by:
        ``gradients``: by how far steps by the signs of some batches' gradients would turn them.
        ``fisher``: by their squared gradients. ``finetune``: by a short full fine-tune, which is scored
        and thrown away. ``tuned``: by a fine-tune that is there. ``scores``, ``selection``: by a file.
    path:
        The fine-tune, scores or selection.
    steps:
        Batches of the gradient probes, or steps of the fine-tune: 100.
    learning_rate:
        Of the fine-tune.
    """

    by: Literal["gradients", "fisher", "finetune", "tuned", "scores", "selection"] = "gradients"
    path: str | None = None
    steps: int | None = None
    learning_rate: float = 2e-5


@dataclass(frozen=True)
class Select:
    """How many neurons, of which tensors: the options of ``extract``, by their names.

    The anatomy is ``units`` unless another is named: of equal size they learn more than rows where there is
    much to learn (docs/results.md).
    """

    neurons: str | None = None
    params: str | None = None
    threshold: float | None = None
    changed: bool = False
    like: str | None = None
    per: Literal["model", "layer", "tensor"] | None = None
    max_per_tensor: int | None = None
    policy: Literal["sensitive", "reversed", "random"] | None = None
    with_bias: bool = False
    seed: int = 0
    anatomy: Literal["rows", "ffn", "units"] = "units"
    score: Literal["cosine", "l2", "relative", "changed", "random", "norm"] | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    axis: dict[str, Any] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        """Which neurons are looked at."""
        return Scope(self.anatomy, self.axis, self.include, self.exclude, self.only)

    @property
    def budget(self) -> dict[str, Any]:
        """What `Budget.of` takes; ``like`` still is a path."""
        names = (
            "neurons",
            "params",
            "threshold",
            "changed",
            "like",
            "per",
            "max_per_tensor",
            "policy",
            "with_bias",
        )
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value not in (None, False)} | {
            "seed": self.seed
        }


@dataclass(frozen=True)
class Train:
    """How to train.

    Attributes
    ----------
    steps, epochs:
        Optimizer steps; None: as many as ``epochs`` rounds over the examples take.
    batch_size, accumulate:
        Examples at once, and batches to a step.
    learning_rate, schedule, warmup, weight_decay, clip:
        Of AdamW; ``warmup`` is a number of steps, or below 1 a share of them.
    save_every:
        Save, and measure the dev loss, every so many steps; None: ten times in all.
    mode:
        As in `neftsurgery.attach`.
    seed:
        Of everything that is drawn.
    more:
        Anything else that ``transformers.TrainingArguments`` takes, by its names there.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int | None = None
    mode: Literal["auto", "scatter", "overlay"] = "auto"
    seed: int = 0
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes
    ----------
    model:
        The base: a folder, or a Hub id.
    out:
        The folder to make.
    """

    model: str
    out: str
    data: Data
    probe: Probe
    select: Select
    train: Train

    def describe(self) -> dict[str, Any]:
        """As it would be written, with whole paths, so that it means the same wherever it lies."""
        described = dataclasses.asdict(self)
        for home, key in (
            (described, "model"),
            (described, "out"),
            (described["data"], "train"),
            (described["data"], "eval"),
            (described["probe"], "path"),
            (described["select"], "like"),
        ):
            if home[key] is not None and (key == "out" or not is_hub_id(home[key])):
                home[key] = os.path.abspath(home[key])
        return described
