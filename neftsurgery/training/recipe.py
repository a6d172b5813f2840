"""A recipe as a value: the model, the data, which neurons to train, and how.

The fields are the declaration of the keys. `neftsurgery.training.recipe_reader` reads recipes by them, and
`neftsurgery.training.recipe_text` writes them with their help. Importing this module loads no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..options import PrefixOptions, Scope
from ..selection.budget import Budget
from ..sources.resolve import is_hub_id

PATH_KEYS = ("model", "out", "data.train", "data.eval", "probe.path", "probe.against", "select.like")
"""The keys whose values are paths. All but ``out`` may also be Hub ids."""
EXAMPLE_PROBES = ("gradients", "fisher", "gradient_over_weight", "activation")
PROBES = (*EXAMPLE_PROBES, "finetune")
"""The values of ``probe.by`` that need the live model."""


def key(default: Any, text: str, **bounds: float) -> Any:
    """The field of a key: its default (a type: an empty one), its help, its bound (``least``, ``above``)."""
    made = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**made, metadata={"help": text, **bounds})


@dataclass(frozen=True)
class Data:
    """The examples to learn from."""

    train: str | list[str] | dict[str, float] = key(
        MISSING,
        "A .jsonl, .csv or .parquet file or a Hub dataset, of prompt and completion, messages, or text; "
        "a list of these; or these with weights, {a.jsonl: 3, b.jsonl: 1}.",
    )
    eval: str | list[str] | None = key(
        None, "Examples for the dev loss, of each set. Without it, a share of each set of train is held back."
    )
    prompt: str | None = key(None, "The prompt of rows with other fields, as in 'Question: {question}'.")
    completion: str | None = key(None, "What is to be learned of such rows, as in ' {answer}'.")
    subset: str | None = key(None, "The configuration of a Hub dataset.")
    split: str = key("train", "The split of a Hub dataset to train on.")
    eval_split: str = key("validation", "The split of a Hub dataset for the dev loss.")
    eval_share: float = key(0.05, "The share to hold back if there is no eval. 0: no dev loss.", least=0)
    loss_on: Literal["completions", "all", "assistant_masks"] = key(
        "completions",
        "The loss is on completions and on what the assistant says, on every token, or on what the chat "
        "template marks by {% generation %}.",
    )
    max_length: int = key(1024, "The most tokens of an example.", above=0)
    long: Literal["truncate", "split"] = key("truncate", "What becomes of longer examples.")
    packing: bool = key(False, "Put several examples into each row of max_length tokens; none sees another.")
    limit: int | None = key(None, "Read at most this many examples of each set to train on.", above=0)

    @property
    def names(self) -> list[str]:
        """The sets to train on."""
        return [self.train] if isinstance(self.train, str) else list(self.train)

    @property
    def eval_names(self) -> list[str]:
        """The sets of the dev loss, if they are given."""
        return [self.eval] if isinstance(self.eval, str) else self.eval or []


@dataclass(frozen=True)
class Probe:
    """How to find out which neurons matter."""

    by: Literal[
        "gradients", "fisher", "gradient_over_weight", "activation", "finetune", "weights", "tuned", "scores",
        "selection",
    ] = key(
        "gradients",
        "How far gradients would turn each neuron, their squares (fisher), or their size over the neuron's "
        "(gradient_over_weight); how its activation differs from other texts' (activation); the change "
        "by a short full fine-tune, which is then deleted (finetune); the base alone, by a select.score such "
        "as magnitude (weights); or by a file at path.",
    )  # fmt: skip
    against: str | None = key(None, "With activation: the other texts, as examples to train on.")
    path: str | None = key(None, "The fine-tune, scores file or selection file.")
    steps: int | None = key(None, "Batches of gradients, or steps of the fine-tune. Default: 100.", above=0)
    learning_rate: float = key(2e-5, "The learning rate of the fine-tune.", above=0)
    strip_prefix: str | None = key(None, "With tuned: remove this from the front of its tensor names.")
    add_prefix: str | None = key(None, "With tuned: put this in front of its tensor names.")


@dataclass(frozen=True)
class Select:
    """Which neurons to train and how many: the options of `extract`, under the same names.

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
    allocate: Literal["size", "equal", "scores"] | None = None
    max_per_tensor: int | None = None
    policy: Literal["sensitive", "reversed", "random"] | None = None
    with_bias: bool = False
    seed: int = 0
    anatomy: Literal["rows", "ffn", "units"] = "units"
    score: Literal["cosine", "l2", "relative", "changed", "magnitude", "lowrank", "norm", "random"] | None = (
        None
    )
    rank: int = key(32, "The rank of score: lowrank.", above=0)
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

    method: Literal["sft", "dpo"] = key(
        "sft", "Learn the examples, or preferences (rows of prompt, chosen, rejected) by TRL's DPOTrainer."
    )
    steps: int | None = key(None, "Optimizer steps. Default: as many as epochs take.", above=0)
    epochs: float = key(1.0, "Passes over the examples.", above=0)
    batch_size: int = key(8, "Examples per batch.", above=0)
    accumulate: int = key(1, "Batches per optimizer step.", above=0)
    learning_rate: float = key(2e-5, "The highest learning rate.", above=0)
    optimizer: str | None = key(None, "By transformers' name: adamw_torch, adafactor, sgd. Default: AdamW.")
    scheduler: str = key("linear", "How the learning rate falls, by transformers' name: cosine, constant.")
    warmup: float = key(0.0, "Steps of rising learning rate; below 1, a share of them.", least=0)
    weight_decay: float = key(0.0, "Of the chosen neurons only.", least=0)
    clip: float = key(1.0, "The largest norm of the gradient.", least=0)
    save_every: int | None = key(None, "Steps between saves, with a dev loss. Default: 10 saves.", above=0)
    early_stopping: int | None = key(None, "Stop after this many saves without a lower dev loss.", above=0)
    logging_steps: int | None = key(None, "Steps between reports. Default: 100 reports.", above=0)
    report_to: list[str] = key(list, "Where else losses go: tensorboard, wandb, trackio.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "Of the model; auto: as in its files."
    )
    device: Literal["auto", "cpu"] = key("auto", "Where it runs; auto: a GPU if there is one.")
    quantization: dict[str, Any] | None = key(
        None,
        "Quantize the frozen model, by transformers' options: {load_in_4bit: true}, {load_in_8bit: true}.",
    )
    attn_implementation: str | None = key(None, "By transformers' name: sdpa, eager, flash_attention_2.")
    gradient_checkpointing: bool = key(False, "Compute the forward pass twice, to use less memory.")
    mode: Literal["auto", "scatter", "overlay"] = key("auto", "Whether weights hold the values: see attach.")
    skip: Literal["unattachable"] | None = key(None, "Leave out, by name, tensors that cannot be attached.")
    seed: int = key(0, "Of the order of examples, the held-back share and dropout.", least=0)
    more: dict[str, Any] = key(dict, "Any other argument of transformers.TrainingArguments, by its name.")


@dataclass(frozen=True)
class Schedule:
    """What a step may cost, and which neurons are trained when."""

    backward: float = key(
        1.0, "The most FLOPs of the backward pass, as a share: layers below what it reaches are not trained.",
        above=0, most=1,
    )  # fmt: skip
    regrow: float = key(
        0.0,
        "The share of the neurons to drop each time, the least changed, for others of the largest gradients; "
        "it falls to 0 with the steps. 0: the same neurons throughout.", least=0, most=1,
    )  # fmt: skip
    regrow_every: int = key(20, "Optimizer steps from one time to the next.", above=0)
    regrow_batches: int = key(4, "Batches of gradients each time.", above=0)


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    model: str = key(MISSING, "The base: a folder, or org/name of the Hub.")
    out: str = key(MISSING, "The folder to create.")
    data: Data = key(MISSING, "The examples to learn from.")
    probe: Probe = key(MISSING, "How to find out which neurons matter.")
    select: Select = key(MISSING, "Which neurons to train and how many, as in `neftsurgery extract`.")
    train: Train = key(MISSING, "How to train.")
    schedule: Schedule = key(MISSING, "What a step may cost, and which neurons are trained when.")
    control: Literal["random"] | None = key(
        None, "Also train as many random neurons, for comparison: into OUT/control."
    )
    push: str | None = key(None, "Publish the patch as org/name on the Hub, once it is trained.")

    def to_json(self) -> dict[str, Any]:
        """All keys, for `read_recipe`. Paths are absolute, so that it means the same in any folder."""
        described = dataclasses.asdict(self)
        for key in PATH_KEYS:
            section, _, name = key.rpartition(".")
            home = described[section] if section else described
            if home[name] is not None:
                home[name] = rooted(home[name], None, out=key == "out")
        return described


def rooted(value: Any, folder: Path | None, *, out: bool) -> Any:
    """A path, a list of paths, or paths with weights, from ``folder``; None: absolute.

    A Hub id stays as it is unless the path exists, or it is ``out``.
    """
    if isinstance(value, Mapping):
        return {rooted(str(path), folder, out=out): weight for path, weight in value.items()}
    if not isinstance(value, str):
        return [rooted(str(path), folder, out=out) for path in value]
    joined = os.path.abspath(value) if folder is None else str(folder / value)
    is_id = is_hub_id(value) and value[0] != "." and not out
    return value if is_id and not os.path.exists(joined) else joined


SECTIONS: Mapping[str, type[Any]] = {
    "data": Data, "probe": Probe, "select": Select, "train": Train, "schedule": Schedule,
}  # fmt: skip


@functools.cache
def known_keys() -> tuple[str, ...]:
    """All keys of a recipe, as ``train.steps``."""
    top = [one.name for one in dataclasses.fields(Recipe) if one.name not in SECTIONS]
    inner = [f"{name}.{one.name}" for name, kind in SECTIONS.items() for one in dataclasses.fields(kind)]
    return (*top, *inner)


def as_key(name: str, value: str | None) -> str:
    """An option as a recipe spells it; one that is not a key stays for whoever shows the message."""
    section = "select" if name in Select.__dataclass_fields__ else "probe"
    if name not in Select.__dataclass_fields__ and name not in PrefixOptions.__annotations__:
        return f"[[{name}]]" if value is None else f"[[{name}={value}]]"
    return f"{section}.{name}" if value is None else f"{section}.{name}: {value}"
