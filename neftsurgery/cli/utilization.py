"""The part of ``neftsurgery report`` that needs a live model: ``--utilization``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..text import plural
from .console import Console
from .options import stack

if TYPE_CHECKING:
    from ..neuron_utilization.plan import UtilizationPlan
    from ..reporting.sections import Section

__all__ = ["Analysis", "plan_analyses", "split_subjects", "take_utilization", "utilization_options"]

_OWN = ("base", "text", "states", "strongly", "anatomy", "tokens", "batch", "dtype", "device", "neurons_out")

utilization_options = stack(
    click.option(
        "--utilization",
        is_flag=True,
        help="The NeFT paper's analysis: run the model on a text, and tell how training moved neurons in the "
        "ranking by their correlation with hidden states.",
    ),
    click.option("--base", metavar="BASE", help="The checkpoint before training: a folder or Hub id."),
    click.option("--text", metavar="FILE", help="A UTF-8 file with a text on each line."),
    click.option(
        "--states",
        type=click.Choice(["preceding", "following", "all"]),
        help="Compare with states before the neuron's block, from it on, or all. Default: preceding.",
    ),
    click.option(
        "--strongly",
        metavar="N|P%",
        help="Strongly affected: moved by more ranks. Default: the paper's, 28.4%.",
    ),
    click.option(
        "--anatomy",
        type=click.Choice(["ffn", "rows"]),
        help="Which neurons. Default: ffn, and the kinds of weights that the patch has neurons of.",
    ),
    click.option(
        "--tokens", type=click.IntRange(min=1), metavar="N", help="Of the text, at most. Default: 32768."
    ),
    click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Tokens at once. Default: 4096."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float64", "float32", "float16", "bfloat16"]),
        help="What the model computes in. Default: auto, the type of its files.",
    ),
    click.option("--device", metavar="NAME", help="Where: cpu, cuda. Default: a GPU if there is one."),
    click.option(
        "--neurons-out", metavar="FILE", help="Write every neuron's numbers to this safetensors file."
    ),
)


def take_utilization(options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the options of `utilization_options` from ``options``; None where it is not asked for.

    Raises
    ------
    UsageError
        If some are given that go with others which are not.
    """
    wanted = options.pop("utilization")
    taken = {name: value for name in _OWN if (value := options.pop(name)) is not None}
    if not wanted:
        if taken:
            raise UsageError(f"--{next(iter(taken)).replace('_', '-')} goes with --utilization")
        return None
    for name in ("base", "text"):
        if name not in taken:
            raise UsageError(f"--utilization needs --{name}", hint="see `neftsurgery report --help`")
    return taken


def split_subjects(subjects: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files of ours, which the report pictures, and checkpoints, which it only analyses."""
    checkpoints = [one for one in subjects if os.path.isdir(one) or not os.path.exists(one)]
    return [one for one in subjects if one not in checkpoints], checkpoints


@dataclass(frozen=True)
class Analysis:
    """The planned analysis of one patch or checkpoint, by its name."""

    name: str
    end: str
    plan: UtilizationPlan
    neurons_out: str | None

    def say(self, console: Console) -> None:
        """What is going to be looked at."""
        text = self.plan.text
        console.say(
            f"{self.name}: {plural(self.plan.neurons, 'neuron')} to rank, before and after, on "
            f"{plural(text.tokens, 'token')} of {plural(text.texts, 'text')}"
            f"{' (there are more)' if text.cut else ''}"
        )
        if self.plan.outside:
            console.note(
                f"warning: {plural(self.plan.outside, 'neuron')} of {self.name} cannot be ranked: they have "
                "another width than hidden states, or lie in no block"
            )

    def run(self, console: Console, *, force: bool) -> Section:
        """Carry it out."""
        from ..neuron_utilization.figures import section_of
        from ..neuron_utilization.measure import measure

        found = measure(self.plan, progress=partial(console.progress, unit="it"))
        if self.neurons_out is not None:
            found.save(self.neurons_out, force=force)
            console.say(f"wrote {self.neurons_out}: every neuron's correlations and ranks")
        return section_of(found, f"Use of neurons: {self.name}", end=self.end)


def plan_analyses(named: Sequence[str], options: dict[str, Any], *, force: bool) -> list[Analysis]:
    """Plan the analysis of each patch or checkpoint of ``named``.

    Raises
    ------
    NeftError
        For what cannot be analysed, or where torch and transformers are not installed.
    """
    try:
        from ..neuron_utilization.plan import plan_utilization
    except ImportError as error:
        raise UsageError(
            f"--utilization needs what is not installed: {error.name}",
            hint="pip install 'neftsurgery[train]'",
        ) from error
    options = dict(options)
    base, text, neurons_out = options.pop("base"), options.pop("text"), options.pop("neurons_out", None)
    if not named:
        raise UsageError("--utilization is of a patch or a checkpoint, not of scores")
    if neurons_out is not None:
        from ..storage.output_checks import refuse_output

        if len(named) > 1:
            raise UsageError("--neurons-out takes the neurons of one patch, and there are several")
        refuse_output(neurons_out, inputs=[base, text, *named], force=force, kind="file")
    return [
        Analysis(
            os.path.basename(os.path.normpath(one)),
            f"-{number}" if len(named) > 1 else "",
            plan_utilization(base, one, text, **options),
            neurons_out,
        )
        for number, one in enumerate(named, 1)
    ]
