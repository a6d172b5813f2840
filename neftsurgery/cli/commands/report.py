"""``neftsurgery report``."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ...errors import UsageError
from ...neuron_utilization.options import ANATOMIES, BATCH, DTYPES, TOKENS, States, UtilizationOptions
from ...options import BudgetOptions, SeedOptions
from ...reporting.inputs import LosslessInput, PatchInput
from ...reporting.report import Report, ReportPlan, plan_report
from ...text import plural, size
from ..console import Console
from ..options import WholeNumber, options_of, output_option, stack, take_budget, writing_options

if TYPE_CHECKING:
    from ...neuron_utilization.utilization import UtilizationPlan
    from ...reporting.sections import ReportSection

__all__ = ["command"]

_utilization_options = stack(
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
        type=WholeNumber(min=1),
        metavar="N",
        help=f"The largest number of tokens of the text. Default: {TOKENS}.",
    ),
    click.option(
        "--batch",
        type=WholeNumber(min=1),
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


@click.command("report")
@click.argument("subjects", nargs=-1, required=True, metavar="SCORES|PATCH|CHECKPOINT...")
@output_option("HTML", text="Write the page to this file.")
@click.option("--figures", metavar="DIR", help="Write each figure to this folder as PNG, SVG and CSV.")
@options_of(BudgetOptions, SeedOptions)
@_utilization_options
@writing_options
def command(
    console: Console,
    subjects: tuple[str, ...],
    out: str | None,
    figures: str | None,
    seed: int,
    force: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Show where a fine-tune changed the model, and which neurons a budget chooses.

    Writes one HTML page on one or several SCORES files or PATCHes. The page needs no network and opens from
    disk. The budget says which neurons count as sensitive; the default is --neurons 3%. Of a lossless patch
    it shows how much of each weight changed, and how it is stored. With --json and no output, the numbers of
    all figures are printed and nothing is drawn.

    With --utilization, the page also shows how training changed the use of neurons: of each PATCH or
    CHECKPOINT compared with --base, on the texts of a file. This loads the model, and needs
    pip install 'neftsurgery[train]'.

    \b
    Example:
      neftsurgery report scores.safetensors -o report.html
      neftsurgery report german.safetensors french.safetensors -o both.html --neurons 5% --figures figures/
      neftsurgery report run/neuron_patch.safetensors -o patch.html
      neftsurgery report neuron_patch.safetensors -o use.html --utilization --base base/ --text text.txt
    """
    if out is None and figures is None and not console.as_json:
        raise UsageError("the report needs an output", hint="name a page: -o report.html")
    (budget, _), utilization = take_budget(options, BudgetOptions), _take_utilization(options)
    files, checkpoints, other_inputs = list(subjects), list[str](), list[str]()
    if utilization is not None:
        files, checkpoints = _split_checkpoints(subjects)
        other_inputs = [utilization["base"], utilization["text"], *checkpoints]
    plan = plan_report(
        files, out=out, figures=figures, force=force, other_inputs=other_inputs, seed=seed, **budget
    )
    for entry in plan.inputs:
        if not isinstance(entry, LosslessInput):
            console.say(f"{entry.name}: {plural(entry.map.neurons, 'neuron')} {entry.word}")
    sections: list[_SectionPlan] = []
    if utilization is not None:
        patches = [f for f, entry in zip(files, plan.inputs, strict=True) if isinstance(entry, PatchInput)]
        sections = _plan_utilization_sections([*patches, *checkpoints], utilization, force=force)
    for section in sections:
        section.say(console)
    described = {**plan.describe(), "subjects": list(subjects)}
    if dry_run:
        for what, path in (("the page", out), ("the figures", figures)):
            if path is not None:
                console.say(f"would write {what} to {path}")
        described |= {"utilization": [section.plan.describe() for section in sections]}
        console.answer({"dry_run": True, **described})
        return
    more = [section.run(console) for section in sections]
    made = plan.run(more=more, progress=functools.partial(console.progress, unit="step"))
    _say_report(console, plan, made)
    console.answer({**described, **made.describe(), "dry_run": False})


def _say_report(console: Console, plan: ReportPlan, made: Report) -> None:
    """The verdict of each figure, and what was written."""
    for section in made.sections:
        title = f"{section.title}: " if len(made.sections) > 1 else ""
        for figure in section.figures:
            if figure.verdict:
                console.say(f"  {title}{figure.verdict}")
    if plan.out is not None:
        nbytes = Path(plan.out).stat().st_size
        console.say(f"wrote {plan.out} ({plural(len(made.figures), 'figure')}, {size(nbytes)})")
    if plan.figures is not None:
        console.say(f"wrote {plan.figures}: each figure as PNG, SVG and CSV")


def _take_utilization(options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the options of `_utilization_options` from ``options``; None without ``--utilization``."""
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


def _split_checkpoints(subjects: Sequence[str]) -> tuple[list[str], list[str]]:
    """The scores files and patches, which get figures of their own, and the checkpoints, which do not."""
    checkpoints = [path for path in subjects if os.path.isdir(path) or not os.path.exists(path)]
    return [path for path in subjects if path not in checkpoints], checkpoints


@dataclass(frozen=True)
class _SectionPlan:
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
        from ...neuron_utilization.report_section import utilization_section

        found = self.plan.run(progress=functools.partial(console.progress, unit="it"))
        if self.plan.out is not None:
            console.say(f"wrote {self.plan.out}: the correlations and ranks of every neuron")
        return utilization_section(found, f"Use of neurons: {self.name}", suffix=self.suffix)


def _plan_utilization_sections(
    paths: Sequence[str], options: dict[str, Any], *, force: bool
) -> list[_SectionPlan]:
    """Plan a section for each patch or checkpoint of ``paths``; torch and transformers must be there."""
    try:
        from ...neuron_utilization.utilization import plan_utilization
    except ImportError as error:
        raise UsageError(
            f"[[utilization]] needs {error.name}, which is not installed",
            hint="pip install 'neftsurgery[train]'",
        ) from error
    options = dict(options)
    base, text, out = options.pop("base"), options.pop("text"), options.pop("neurons_out", None)
    if not paths:
        raise UsageError("[[utilization]] needs a patch of chosen neurons, or a checkpoint")
    if out is not None and len(paths) > 1:
        raise UsageError("[[neurons_out]] needs exactly one patch or checkpoint", found=len(paths))
    return [
        _SectionPlan(
            os.path.basename(os.path.normpath(path)),
            f"-{number}" if len(paths) > 1 else "",
            plan_utilization(base, path, text, out=out, force=force, **options),
        )
        for number, path in enumerate(paths, 1)
    ]
