"""``neftsurgery report``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ...options import BudgetOptions, SeedOptions
from ...reporting.report import make, plan_report
from ...reporting.subjects import Patched
from ...selection.selection import Selection
from ...text import plural, size
from ..console import Console
from ..options import common_options, dry_run_option, force_option, options_of, output_option, take
from ..utilization import plan_analyses, split_subjects, take_utilization, utilization_options

__all__ = ["command"]


@click.command("report")
@click.argument("subjects", nargs=-1, required=True, metavar="SCORES|PATCH|CHECKPOINT...")
@output_option("HTML", text="Write the page to this file.")
@click.option("--figures", metavar="DIR", help="Write each figure to this folder: PNG, SVG, CSV.")
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
    """See it: where a fine-tune changed the model, which neurons a budget chooses, and how sure that is.

    One HTML page of one or several SCORES files or PATCHes. It needs no network and opens from disk. The
    budget says which neurons count as sensitive; by default it is --neurons 3%. With --json alone, the
    numbers of all figures are printed and nothing is drawn.

    With --utilization also what training did to the use of neurons, of PATCHes and CHECKPOINTs beside
    --base, on the texts of a file. That loads the model, and needs pip install 'neftsurgery[train]'.

    \b
    Example:
      neftsurgery report scores.safetensors -o report.html
      neftsurgery report german.safetensors french.safetensors -o both.html --neurons 5% --figures figures/
      neftsurgery report run/neuron_patch.safetensors -o patch.html
      neftsurgery report neuron_patch.safetensors -o use.html --utilization --base base/ --text text.txt
    """
    if out is None and figures is None and not console.as_json:
        raise UsageError("nothing says where the report goes", hint="name a page: -o report.html")
    budget, wanted = take(options, BudgetOptions), take_utilization(options)
    if "like" in budget:
        budget["like"] = Selection.load(budget["like"])
    files, checkpoints = (subjects, []) if wanted is None else split_subjects(subjects)
    inputs = [] if wanted is None else [wanted["base"], wanted["text"], *checkpoints]
    plan = plan_report(files, {**budget, "seed": seed}, out=out, figures=figures, force=force, inputs=inputs)
    for subject in plan.subjects:
        console.say(f"{subject.name}: {plural(subject.map.neurons, 'neuron')} {subject.word}")
    analyses = []
    if wanted is not None:
        patches = [one for one, s in zip(files, plan.subjects, strict=True) if isinstance(s, Patched)]
        analyses = plan_analyses([*patches, *checkpoints], wanted, force=force)
    for analysis in analyses:
        analysis.say(console)
    if dry_run:
        for what, where in (("the page", out), ("the figures", figures)):
            if where is not None:
                console.say(f"would write {what} to {where}")
        console.answer(
            {
                "dry_run": True,
                "subjects": list(subjects),
                "out": out,
                "figures_folder": figures,
                "utilization": [analysis.plan.describe() for analysis in analyses],
            }
        )
        return
    more = [analysis.run(console, force=force) for analysis in analyses]
    made = make(plan, more=more, progress=functools.partial(console.progress, unit="step"))
    for section in made.sections:
        for figure in section.figures:
            if figure.verdict:
                console.say(
                    f"  {section.title}: {figure.verdict}"
                    if len(made.sections) > 1
                    else f"  {figure.verdict}"
                )
    if out is not None:
        console.say(f"wrote {out} ({plural(len(made.figures), 'figure')}, {size(Path(out).stat().st_size)})")
    if figures is not None:
        console.say(f"wrote {figures}: each figure as PNG, SVG and CSV")
    console.answer({"out": out, "figures_folder": figures, **made.describe(), "dry_run": False})
