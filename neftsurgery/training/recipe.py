"""A recipe as a value: the model, the data, which neurons to train, and how.

`neftsurgery.training.recipe_reader` reads recipes. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ..options import Scope
from ..selection.budget import Budget
from ..sources.resolve import is_hub_id

PATH_KEYS = ("model", "out", "data.train", "data.eval", "probe.path", "select.like")
"""The keys whose values are paths. All but ``out`` may also be Hub ids."""


@dataclass(frozen=True)
class Data:
    """The examples to learn from."""

    # A ``.jsonl`` file, or the Hub id of a dataset. Each line, or row, has ``prompt`` and ``completion``, or
    # ``messages``, or ``text``.
    train: str
    eval: str | None = None
    # The prompt template for rows with other fields: two texts with the fields in braces, as in
    # ``Question: {question}``.
    prompt: str | None = None
    completion: str | None = None
    # The configuration and the splits of a Hub dataset.
    subset: str | None = None
    split: str = "train"
    eval_split: str = "validation"
    # The share of ``train`` to hold back for the dev loss if there is no ``eval``. 0: no dev loss.
    eval_share: float = 0.05
    # ``completions``: the loss is on what follows the prompt, or on what the assistant says. ``all``: it is
    # on every token.
    loss_on: Literal["completions", "all"] = "completions"
    # The maximum number of tokens in an example. Longer examples are truncated.
    max_length: int = 1024
    limit: int | None = None  # the maximum number of examples to read from ``train``


@dataclass(frozen=True)
class Probe:
    """How to find out which neurons matter."""

    # ``gradients``: how far sign-gradient steps on some batches would turn each neuron. ``fisher``: the
    # squared gradients of each neuron. ``finetune``: a short full fine-tune, which is scored and then
    # deleted. ``tuned``: an existing fine-tune. ``scores``, ``selection``: a file.
    by: Literal["gradients", "fisher", "finetune", "tuned", "scores", "selection"] = "gradients"
    path: str | None = None  # the fine-tune, the scores file or the selection file
    # The number of batches of a gradient probe, or of steps of the fine-tune. Default: 100.
    steps: int | None = None
    learning_rate: float = 2e-5  # the learning rate of the fine-tune
    # For ``tuned``: how its tensor names become those of the base, as in `neftsurgery.extract`.
    strip_prefix: str | None = None
    add_prefix: str | None = None


@dataclass(frozen=True)
class Select:
    """Which neurons to train and how many: the options of ``extract``, under the same names.

    The fields of this class are the only list of these keys in this package: those of `Budget`, those of
    `Scope`, and ``score``. The default anatomy is ``units``: units learn more than rows at the same number of
    parameters if there is much to learn (docs/results.md).
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
        """Which neurons are scored."""
        return Scope(**{one.name: getattr(self, one.name) for one in dataclasses.fields(Scope)})

    @property
    def budget(self) -> dict[str, Any]:
        """The arguments of `Budget.of` that are set. ``like`` is still a path."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(Budget)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


@dataclass(frozen=True)
class Train:
    """How to train."""

    # The number of optimizer steps. ``steps`` None: as many as ``epochs`` passes over the examples take.
    steps: int | None = None
    epochs: float = 1.0
    # Examples per batch, and batches per optimizer step.
    batch_size: int = 8
    accumulate: int = 1
    # The settings of AdamW. ``warmup`` is a number of steps or, below 1, a share of the steps.
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    # The number of steps between two saves. Each save measures the dev loss. None: ten saves per run.
    save_every: int | None = None
    mode: Literal["auto", "scatter", "overlay"] = "auto"  # as in `neftsurgery.attach`, and ``skip`` too
    skip: Literal["unattachable"] | None = None
    seed: int = 0  # the seed of the order of examples, the held-back share and dropout
    # Any other argument of ``transformers.TrainingArguments``, by its name.
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    model: str  # the base: a folder, or a Hub id
    out: str  # the folder to create
    data: Data
    probe: Probe
    select: Select
    train: Train

    def to_json(self) -> dict[str, Any]:
        """All keys, for `read_recipe`. Paths are absolute, so that it means the same in any folder."""
        described = dataclasses.asdict(self)
        for key in PATH_KEYS:
            section, _, name = key.rpartition(".")
            home = described[section] if section else described
            if home[name] is not None and (key == "out" or not is_hub_id(home[name])):
                home[name] = os.path.abspath(home[name])
        return described
