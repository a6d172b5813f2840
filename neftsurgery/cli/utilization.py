"""The options of ``neftsurgery report --utilization``, and the sections that they add to the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click

from ..errors import UsageError
from ..neuron_utilization.options import ANATOMIES, BATCH, DTYPES, TOKENS, States, UtilizationOptions
from ..text import plural
from .console import Console
from .options import stack

if TYPE_CHECKING:
    from ..neuron_utilization.utilization import UtilizationPlan
    from ..reporting.sections import ReportSection

__all__ = [
    "SectionPlan",
    "plan_utilization_sections",
    "split_checkpoints",
    "take_utilization",
    "utilization_options",
]

utilization_options = stack(
    click.option(
        "--utilization",
        is_flag=True,
        help="Add the analysis of the NeFT paper: run the model on a text, and show how training moved "
        "neurons in the ranking by correlation with hidden states.",
    ),
    click.option("--base", metavar="BASE", help="The checkpoint before training: a folder or Hub id."),
    click.option("--text", metavar="FILE", help="A UTF-8 file with a text on each line."),
    click.option(
        "--states",
        type=click.Choice(get_args(States)),
        help="Compare with hidden states that enter the neuron's block or an earlier one (preceding), that "
        "leave its block or a later one (following), or with all. Default: preceding.",
    ),
    click.option(
        "--strongly",
        metavar="N|P%",
        help="The rank change above which a neuron is strongly affected. Default: 28.4%, as in the paper.",
    ),
    click.option(
        "--anatomy",
        type=click.Choice(ANATOMIES),
        help="Which neurons are ranked. Default: ffn, and the kinds of weight that the patch changes.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"The largest number of tokens of the text. Default: {TOKENS}.",
    ),
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"The number of tokens that go through the model at once. Default: {BATCH}.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPES]),
        help="What the model computes in. Default: auto, the dtype of its files.",
    ),
    click.option(
        "--device", metavar="NAME", help="Where the model runs: cpu, cuda. Default: a GPU if there is one."
    ),
    click.option(
        "--neurons-out", metavar="FILE", help="Write the numbers of every neuron to this safetensors file."
    ),
)


def take_utilization(options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the options of `utilization_options` from ``options``; None without ``--utilization``.

    Raises
    ------
    UsageError
        If options are given without those that they need.
    """
    wanted = options.pop("utilization")
    names = ("base", "text", "neurons_out", *UtilizationOptions.__annotations__)
    taken = {name: value for name in names if (value := options.pop(name, None)) is not None}
    if not wanted:
        if taken:
            raise UsageError(f"[[{next(iter(taken))}]] needs [[utilization]]")
        return None
    for name in ("base", "text"):
        if name not in taken:
            raise UsageError(f"[[utilization]] needs [[{name}]]", hint="see `neftsurgery report --help`")
    return taken


def split_checkpoints(subjects: Sequence[str]) -> tuple[list[str], list[str]]:
    """The scores files and patches, which get figures of their own, and the checkpoints, which do not."""
    checkpoints = [path for path in subjects if os.path.isdir(path) or not os.path.exists(path)]
    return [path for path in subjects if path not in checkpoints], checkpoints


@dataclass(frozen=True)
class SectionPlan:
    """The planned utilization of one patch or checkpoint, and the section of the report that shows it."""

    name: str
    suffix: str
    plan: UtilizationPlan

    def say(self, console: Console) -> None:
        """Say what will be ranked."""
        text = self.plan.text
        console.say(
            f"{self.name}: {plural(self.plan.neurons, 'neuron')} to rank, before and after, on "
            f"{plural(text.tokens, 'token')} of {plural(text.texts, 'text')}"
            f"{' (there are more)' if text.truncated else ''}"
        )
        if self.plan.unranked:
            console.note(
                f"warning: {plural(self.plan.unranked, 'neuron')} of {self.name} cannot be ranked: their "
                "width is not that of the hidden states, or they are in no block"
            )

    def run(self, console: Console) -> ReportSection:
        """Run the plan, and make the section."""
        from ..neuron_utilization.report_section import utilization_section

        found = self.plan.run(progress=partial(console.progress, unit="it"))
        if self.plan.out is not None:
            console.say(f"wrote {self.plan.out}: the correlations and ranks of every neuron")
        return utilization_section(found, f"Use of neurons: {self.name}", suffix=self.suffix)


def plan_utilization_sections(
    paths: Sequence[str], options: dict[str, Any], *, force: bool
) -> list[SectionPlan]:
    """Plan a section for each patch or checkpoint of ``paths``.

    Raises
    ------
    NeftError
        If one of them cannot be measured, or torch and transformers are not installed.
    """
    try:
        from ..neuron_utilization.utilization import plan_utilization
    except ImportError as error:
        raise UsageError(
            f"[[utilization]] needs {error.name}, which is not installed",
            hint="pip install 'neftsurgery[train]'",
        ) from error
    options = dict(options)
    base, text, out = options.pop("base"), options.pop("text"), options.pop("neurons_out", None)
    if not paths:
        raise UsageError("[[utilization]] needs a patch or a checkpoint, not only scores")
    if out is not None and len(paths) > 1:
        raise UsageError("[[neurons_out]] needs exactly one patch or checkpoint", found=len(paths))
    return [
        SectionPlan(
            os.path.basename(os.path.normpath(path)),
            f"-{number}" if len(paths) > 1 else "",
            plan_utilization(base, path, text, out=out, force=force, **options),
        )
        for number, path in enumerate(paths, 1)
    ]
