"""``neftsurgery report``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ...report.report import make, plan_report
from ...selection.selection import Selection
from ..console import Console, plural, size
from ..options import (
    budget_options,
    common_options,
    dry_run_option,
    force_option,
    output_option,
    seed_option,
    take_budget,
)

__all__ = ["command"]


@click.command("report")
@click.argument("subjects", nargs=-1, required=True, metavar="SCORES|PATCH...")
@output_option("HTML", text="Write the page to this file.")
@click.option("--figures", metavar="DIR", help="Write each figure to this folder: PNG, SVG, CSV.")
@budget_options
@seed_option
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

    \b
    Example:
      neftsurgery report scores.safetensors -o report.html
      neftsurgery report german.safetensors french.safetensors -o both.html --neurons 5% --figures figures/
      neftsurgery report run/neuron_patch.safetensors -o patch.html
    """
    if out is None and figures is None and not console.as_json:
        raise UsageError("nothing says where the report goes", hint="name a page: -o report.html")
    budget = take_budget(options)
    if "like" in budget:
        budget["like"] = Selection.load(budget["like"])
    plan = plan_report(subjects, {**budget, "seed": seed}, out=out, figures=figures, force=force)
    for subject in plan.subjects:
        console.say(f"{subject.name}: {plural(subject.map.neurons, 'neuron')} {subject.word}")
    if dry_run:
        for what, where in (("the page", out), ("the figures", figures)):
            if where is not None:
                console.say(f"would write {what} to {where}")
        console.answer({"dry_run": True, "subjects": list(subjects), "out": out, "figures_folder": figures})
        return
    made = make(plan, progress=functools.partial(console.progress, unit="step"))
    for section in made.sections:
        for figure in section.figures:
            if figure.verdict:
                console.say(
                    f"  {section.title}: {figure.verdict}" if len(subjects) > 1 else f"  {figure.verdict}"
                )
    if out is not None:
        console.say(f"wrote {out} ({plural(len(made.figures), 'figure')}, {size(Path(out).stat().st_size)})")
    if figures is not None:
        console.say(f"wrote {figures}: each figure as PNG, SVG and CSV")
    console.answer({"out": out, "figures_folder": figures, **made.describe(), "dry_run": False})
