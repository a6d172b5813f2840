"""``neftsurgery report``."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...neuron_utilization.options import UtilizationOptions
from ...options import BudgetOptions, SeedOptions
from ...reporting.inputs import LosslessInput, PatchInput
from ...reporting.report import Report, ReportPlan, plan_report
from ...text import plural, size
from ...version import install_command
from ..console import Console
from ..options import options_of, output_option, take_budget, writing_options

if TYPE_CHECKING:
    from ...neuron_utilization.utilization import UtilizationPlan
    from ...reporting.sections import ReportSection


@click.command("report")
@click.argument("subjects", nargs=-1, required=True, metavar="SCORES|PATCH|CHECKPOINT...")
@output_option("HTML", text="Write the page to this file.")
@click.option("--figures", metavar="DIR", help="Write each figure to this folder as PNG, SVG and CSV.")
@options_of(BudgetOptions, SeedOptions)
@click.option(
    "--utilization",
    is_flag=True,
    help="Add the analysis of the NeFT paper: run the model on a text, and show how training moved "
    "neurons in the ranking by correlation with hidden states.",
)
@click.option("--base", metavar="BASE", help="The checkpoint before training: a folder or Hub id.")
@click.option("--text", metavar="FILE", help="A UTF-8 file with a text on each line.")
@options_of(UtilizationOptions)
@click.option(
    "--neurons-out", metavar="FILE", help="Write the numbers of every neuron to this safetensors file."
)
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
    the extra '.[train]'.

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
        # Scores files and patches get figures of their own, checkpoints do not.
        checkpoints = [path for path in subjects if os.path.isdir(path) or not os.path.exists(path)]
        files = [path for path in subjects if path not in checkpoints]
        other_inputs = [utilization["base"], utilization["text"], *checkpoints]
    plan = plan_report(
        files, out=out, figures=figures, force=force, other_inputs=other_inputs, seed=seed, **budget
    )
    for entry in plan.inputs:
        if not isinstance(entry, LosslessInput):
            console.say(f"{entry.name}: {plural(entry.map.neurons, 'neuron')} {entry.word}")
    plans: list[tuple[str, UtilizationPlan]] = []
    if utilization is not None:
        patches = [f for f, entry in zip(files, plan.inputs, strict=True) if isinstance(entry, PatchInput)]
        plans = _plan_utilizations(console, [*patches, *checkpoints], force=force, **utilization)
    described = {**plan.describe(), "subjects": list(subjects)}
    if dry_run:
        for what, path in (("the page", out), ("the figures", figures)):
            if path is not None:
                console.say(f"would write {what} to {path}")
        described |= {"utilization": [use.describe() for _, use in plans]}
        console.answer({"dry_run": True, **described})
        return
    more = list(_utilization_sections(console, plans))
    made = plan.run(more=more, progress=functools.partial(console.progress, unit="step"))
    _say_report(console, plan, made)
    console.answer({**described, **made.describe(), "dry_run": False})


def _say_report(console: Console, plan: ReportPlan, made: Report) -> None:
    """The verdicts of each section and of its figures, and what was written."""
    for section in made.sections:
        title = f"{section.title}: " if len(made.sections) > 1 else ""
        for verdict in dict.fromkeys((*section.verdict, *(figure.verdict for figure in section.figures))):
            if verdict:
                console.say(f"  {title}{verdict}")
    if plan.out is not None:
        nbytes = Path(plan.out).stat().st_size
        console.say(f"wrote {plan.out} ({plural(len(made.figures), 'figure')}, {size(nbytes)})")
    if plan.figures is not None:
        console.say(f"wrote {plan.figures}: each figure as PNG, SVG and CSV")


def _take_utilization(options: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the options of the utilization from ``options``; None without ``--utilization``."""
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


def _utilization_sections(
    console: Console, plans: Sequence[tuple[str, UtilizationPlan]]
) -> Iterator[ReportSection]:
    """Run the plans, and make a section of each."""
    for number, (name, plan) in enumerate(plans, 1):
        from ...neuron_utilization.report_section import utilization_section

        found = plan.run(progress=functools.partial(console.progress, unit="it"))
        if plan.out is not None:
            console.say(f"wrote {plan.out}: the correlations and ranks of every neuron")
        suffix = f"-{number}" if len(plans) > 1 else ""
        yield utilization_section(found, f"Use of neurons: {name}", suffix=suffix)


def _plan_utilizations(
    console: Console, paths: Sequence[str], *, neurons_out: str | None = None, **options: Any
) -> list[tuple[str, UtilizationPlan]]:
    """A plan for each patch or checkpoint of ``paths``, with its name; needs torch and transformers."""
    try:
        from ...neuron_utilization.utilization import plan_utilization
    except ImportError as error:
        raise UsageError(
            f"[[utilization]] needs {error.name}, which is not installed",
            hint=install_command("train"),
        ) from error
    if not paths:
        raise UsageError("[[utilization]] needs a patch of chosen neurons, or a checkpoint")
    if neurons_out is not None and len(paths) > 1:
        raise UsageError("[[neurons_out]] needs exactly one patch or checkpoint", found=len(paths))
    plans = []
    for path in paths:
        name = os.path.basename(os.path.normpath(path))
        plan = plan_utilization(tuned=path, out=neurons_out, **options)
        plans.append((name, plan))
        console.say(
            f"{name}: {plural(plan.neurons, 'neuron')} to rank, before and after, on "
            f"{plural(plan.text.tokens, 'token')} of {plural(plan.text.texts, 'text')}"
            f"{' (there are more)' if plan.text.truncated else ''}"
        )
        if plan.unranked:
            console.note(
                f"warning: {plural(plan.unranked, 'neuron')} of {name} cannot be ranked: their "
                "width is not that of the hidden states, or they are in no block"
            )
    return plans
