"""The options that commands, recipes and Python share, each declared once: its type, its help, its choices.

A `TypedDict` per group is the keywords of the Python verbs (``**options: Unpack[ScopeOptions]``). The command
line makes its flags of the same declarations (`declared`), a recipe its keys, and the values `Scope`,
`selection.budget.Budget` and `storage.threads.Limits` are made of what was given.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypedDict, get_args, get_type_hints

from .progress import Progress

#: Patterns of tensor names to neuron axes: ``{"*.kernel": 1}``, or pairs; the last match wins.
AxisOption = Mapping[str, int | Sequence[int]] | Sequence[tuple[str, int | Sequence[int]]]


class HasCounts(Protocol):
    """What ``like`` takes besides counts: a `Selection`."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Per tensor name, how many neurons."""


@dataclass(frozen=True, slots=True)
class Option:
    """What every surface needs to know of an option besides its name and type."""

    help: str  # one or two sentences
    metavar: str | None = None  # what stands for the value on the command line
    choices: tuple[str, ...] = ()  # the only values, if they are few
    default: str | int | None = None  # shown in help
    alone: str | None = None  # the value of a flag that stands alone


class PatternOptions(TypedDict, total=False):
    """Which tensors are looked at."""

    include: Annotated[
        Sequence[str], Option("Score these tensors too: embeddings, head, norms, routers.", metavar="GLOB")
    ]
    exclude: Annotated[
        Sequence[str], Option("Leave these tensors out, whatever [[include]] says.", metavar="GLOB")
    ]
    only: Annotated[Sequence[str], Option("Score only these tensors.", metavar="GLOB")]
    axis: Annotated[
        AxisOption,
        Option(
            "The neuron axes of tensors that no config explains, such as '*.kernel=1'. The last match wins.",
            metavar="GLOB=N[,M]",
        ),
    ]


_NEURON = (
    "What a neuron is: an output unit of a linear or convolution weight (rows); an up row or down "
    "column of a feed-forward block (ffn); all weights of a feed-forward or attention unit (units)."
)


class ScopeOptions(PatternOptions, total=False):
    """Which neurons are looked at."""

    anatomy: Annotated[str, Option(_NEURON, choices=("rows", "ffn", "units"), default="rows")]


class InspectOptions(PatternOptions, total=False):
    """What is shown of a checkpoint."""

    anatomy: Annotated[
        str,
        Option(
            f"{_NEURON} All, or the flag alone: what was understood of each kind of weight, and which "
            "of these are offered.",
            choices=("rows", "ffn", "units", "all"),
            default="rows",
            alone="all",
        ),
    ]


class PrefixOptions(TypedDict, total=False):
    """How the names of a tuned checkpoint become those of its base."""

    strip_prefix: Annotated[
        str,
        Option("Remove this from the front of TUNED's tensor names, as in 'model.'.", metavar="PREFIX"),
    ]
    add_prefix: Annotated[
        str,
        Option(
            "Put this in front of TUNED's tensor names: of those that had the stripped prefix, or else of "
            "those that BASE does not have.",
            metavar="PREFIX",
        ),
    ]


class ScoreOptions(TypedDict, total=False):
    """How sensitivity is measured."""

    score: Annotated[
        str,
        Option(
            "How sensitivity is measured; random and norm are controls. The last four are of the base alone.",
            choices=("cosine", "l2", "relative", "changed", "magnitude", "lowrank", "norm", "random"),
            default="cosine",
        ),
    ]
    rank: Annotated[int, Option("The rank of [[score=lowrank]].", metavar="N", default=32)]


class BudgetOptions(TypedDict, total=False):
    """How many neurons are chosen, out of which pools, and which first."""

    neurons: Annotated[
        str | int,
        Option("Choose this many neurons, or this share of the scored ones: 50000, 3%.", metavar="N|P%"),
    ]
    params: Annotated[
        str | int,
        Option(
            "Choose neurons with this many parameters, or this share of the model's: 200M, 3%.",
            metavar="N|P%",
        ),
    ]
    threshold: Annotated[float, Option("Choose every neuron that scores above X.", metavar="X")]
    changed: Annotated[
        bool, Option("Choose every neuron with any differing bit: lossless on the tensors it covers.")
    ]
    like: Annotated[
        HasCounts | Mapping[str, int],
        Option("Choose as many per tensor as another selection has, for controls.", metavar="SELECTION"),
    ]
    per: Annotated[
        str,
        Option(
            "Choose from one pool (model), or from each layer's or tensor's. Default: model.",
            choices=("model", "layer", "tensor"),
        ),
    ]
    allocate: Annotated[
        str,
        Option(
            "Divide the budget over the pools by their size, equally, or by the sum of their scores.",
            choices=("size", "equal", "scores"),
        ),
    ]
    max_per_tensor: Annotated[int, Option("Choose at most this many neurons of any tensor.", metavar="N")]
    policy: Annotated[
        str,
        Option(
            "Choose the most sensitive first, the least sensitive first, or at random. Default: sensitive.",
            choices=("sensitive", "reversed", "random"),
        ),
    ]
    with_bias: Annotated[bool, Option("Choose the bias elements of the chosen neurons as well.")]


class SeedOptions(TypedDict, total=False):
    """The seed of everything random."""

    seed: Annotated[
        int, Option("The seed of [[policy=random]] and [[score=random]].", metavar="N", default=0)
    ]


class RunOptions(TypedDict, total=False):
    """How much of the machine the work takes, and who is told how far it is. No result depends on them."""

    threads: Annotated[
        int | None, Option("The number of reading and computing threads. Default: two per core.", metavar="N")
    ]
    memory: Annotated[
        int | None,
        Option(
            "Memory for buffers and mapped files, such as 100MB or 1GiB. Default: 176MiB.", metavar="SIZE"
        ),
    ]
    progress: Progress


class SpreadOptions(TypedDict, total=False):
    """Whose processes do the work."""

    executor: Annotated[
        Executor | None,
        Option(
            "Have the workers of a Dask scheduler (tcp://host:8786, or its file) do the work. They must see "
            "the same paths.",
            metavar="ADDRESS",
        ),
    ]


class OutputOptions(TypedDict, total=False):
    """Where an output goes (None: into a temporary file), and whether one that exists is replaced."""

    out: str | os.PathLike[str] | None
    force: bool


class LosslessOptions(TypedDict, total=False):
    """Whether, and how, a whole fine-tune is kept."""

    lossless: Annotated[
        bool,
        Option(
            "Keep the whole fine-tune instead of chosen neurons: base plus patch is the tuned checkpoint, "
            "to the bit."
        ),
    ]
    fast: Annotated[
        bool, Option("With [[lossless]]: a larger patch, decoded about as fast as memory is copied.")
    ]
    weights_only: Annotated[
        bool,
        Option("With [[lossless]]: leave out the config, the tokenizer and other files beside the weights."),
    ]


class ChainOptions(TypedDict, total=False):
    """Whether, and how, lossless patches that follow each other become one."""

    chain: Annotated[
        bool,
        Option(
            "Make one lossless patch of those that follow each other, from the first base to the last "
            "checkpoint; a folder stands for its patches. Needs [[base=...]]."
        ),
    ]
    fast: Annotated[bool | None, Option("With [[chain]]: as for extract. Default: if every patch is so.")]
    weights_only: Annotated[
        bool | None, Option("With [[chain]]: as for extract. Default: if every patch is so.")
    ]


class ExportOptions(TypedDict, total=False):
    """The form of a LoRA adapter."""

    rank: Annotated[
        int | None, Option("Pad to this rank. Default: the next rank that vLLM takes.", metavar="N")
    ]
    rank_pattern: Annotated[
        bool, Option("Give each module the rank that it needs, by PEFT's rank_pattern: much smaller.")
    ]
    dtype: Annotated[
        str,
        Option(
            "The type of the factors; shorter ones round the differences.",
            choices=("f32", "bf16", "f16"),
            default="f32",
        ),
    ]
    prefix: Annotated[
        str,
        Option(
            "Name modules as the files do, with this in front: transformer. for a GPT-2 that was saved "
            "without its head. Default: as the live model does, where it can be asked.",
            metavar="TEXT",
        ),
    ]


class SelectOptions(BudgetOptions, SeedOptions):
    """The keywords of `Scores.select`."""


class CompareOptions(ScoreOptions, ScopeOptions, PrefixOptions, SeedOptions):
    """How a tuned checkpoint is scored against its base."""


class ChoosingOptions(PrefixOptions, ScopeOptions, ScoreOptions, SelectOptions):
    """How neurons are chosen of two checkpoints."""


class RunAnywhereOptions(RunOptions, SpreadOptions):
    """How work is run, where other processes may do it."""


class DiffOptions(CompareOptions, RunAnywhereOptions):
    """The keywords of `diff` besides its output."""


class ExtractOptions(ChoosingOptions, LosslessOptions, OutputOptions):
    """The keywords of `extract` that say what is kept, and where."""


class CutOptions(ChoosingOptions, OutputOptions, RunAnywhereOptions):
    """The keywords of `extract` for chosen neurons, besides its inputs."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which neurons are looked at: the values of `ScopeOptions`."""

    anatomy: str = "rows"
    axis: AxisOption = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    only: Sequence[str] = ()


def declared(group: type) -> dict[str, tuple[Any, Option]]:
    """By name, the type and the declaration of every option of a group, in order."""
    hints = get_type_hints(group, include_extras=True)
    return {
        name: (get_args(hint)[0], extra)
        for name, hint in hints.items()
        for extra in get_args(hint)[1:]
        if isinstance(extra, Option)
    }


def split(verb: str, options: Mapping[str, Any], *groups: type) -> list[dict[str, Any]]:
    """Sort the keywords a verb was called with by group; for a keyword of none of them, a `TypeError`."""
    names = [tuple(group.__annotations__) for group in groups]  # of a TypedDict, the inherited ones too
    known = [name for group in names for name in group]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}{hint}")
    return [{name: options[name] for name in group if name in options} for group in names]
