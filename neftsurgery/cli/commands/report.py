"""``neftsurgery report``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ...options import BudgetOptions, SeedOptions
from ...reporting.inputs import PatchInput
from ...reporting.report import Report, ReportPlan, plan_report
from ...selection.selection import Selection
from ...text import plural, size
from ..console import Console
from ..options import common_options, dry_run_option, force_option, options_of, output_option, take
from ..utilization import (
    SectionPlan,
    plan_utilization_sections,
    split_checkpoints,
    take_utilization,
    utilization_options,
)

__all__ = ["command"]


@click.command("report")
@click.argument("subjects", nargs=-1, required=True, metavar="SCORES|PATCH|CHECKPOINT...")
@output_option("HTML", text="Write the page to this file.")
@click.option("--figures", metavar="DIR", help="Write each figure to this folder as PNG, SVG and CSV.")
@options_of(BudgetOptions, SeedOptions)
@utilization_options
@force_option
@dry_run_option
@common_options
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
    disk. The budget says which neurons count as sensitive; the default is --neurons 3%. With --json and no
    output, the numbers of all figures are printed and nothing is drawn.

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
    budget, utilization = take(options, BudgetOptions), take_utilization(options)
    if "like" in budget:
        budget["like"] = Selection.load(budget["like"])
    files, checkpoints, other_inputs = list(subjects), list[str](), list[str]()
    if utilization is not None:
        files, checkpoints = split_checkpoints(subjects)
        other_inputs = [utilization["base"], utilization["text"], *checkpoints]
    plan = plan_report(
        files, out=out, figures=figures, force=force, other_inputs=other_inputs, seed=seed, **budget
    )
    for entry in plan.inputs:
        console.say(f"{entry.name}: {plural(entry.map.neurons, 'neuron')} {entry.word}")
    sections: list[SectionPlan] = []
    if utilization is not None:
        patches = [f for f, entry in zip(files, plan.inputs, strict=True) if isinstance(entry, PatchInput)]
        sections = plan_utilization_sections([*patches, *checkpoints], utilization, force=force)
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
