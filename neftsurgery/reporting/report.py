"""report: pictures of scores and patches, as one page, as files, as numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import text
from ..errors import UsageError, boundary
from ..progress import Progress, silent
from ..selection.budget import Budget
from ..selection.selection import Selection
from ..storage.output import staged_directory, staged_file
from ..storage.output_checks import refuse_output
from .drawing import require_matplotlib
from .figure import Figure
from .page import render
from .sections import Section, sections_of, steps
from .subjects import Subject, open_subjects

__all__ = ["Report", "ReportPlan", "make", "plan_report", "report"]

AnyPath = str | os.PathLike[str]
_DEFAULT = "3%"


@dataclass(frozen=True)
class Report:
    """A report: its sections, and everything that is computed for them.

    Attributes
    ----------
    title:
        Of the page.
    sections:
        In the order of the page.
    """

    title: str
    sections: tuple[Section, ...]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """All figures by their ids."""
        return {figure.id: figure for section in self.sections for figure in section.figures}

    def html(self, step: Callable[[int], object] = int) -> str:
        """The page; ``step`` is told of each figure drawn.

        Raises
        ------
        UsageError
            If matplotlib or jinja2 is not installed.
        """
        return render(self.title, self.sections, step)

    def describe(self) -> dict[str, Any]:
        """For JSON: per section what it is about, per figure its numbers."""
        return {
            "sections": [
                {"id": section.id, **section.data, "figures": [figure.id for figure in section.figures]}
                for section in self.sections
            ],
            "figures": {name: figure.describe() for name, figure in self.figures.items()},
        }

    def write_figures(self, folder: Path, step: Callable[[int], object] = int) -> None:
        """Write each figure into an existing folder: ``ID.png``, ``ID.svg`` and ``ID.csv``."""
        for name, figure in self.figures.items():
            if figure.draw is not None:
                (folder / f"{name}.png").write_bytes(figure.png())
                (folder / f"{name}.svg").write_text(figure.svg(), encoding="utf-8")
            # A name can hold what UTF-8 cannot: half of a surrogate pair.
            (folder / f"{name}.csv").write_text(
                figure.table.csv(), encoding="utf-8", errors="backslashreplace"
            )
            step(1)


@dataclass(frozen=True)
class ReportPlan:
    """A planned report: everything is opened, checked and chosen; nothing is computed or written yet.

    Attributes
    ----------
    subjects:
        What it is about.
    out, figures:
        Where the page and the pictures go; None: nowhere.
    force:
        Whether these may be replaced.
    """

    subjects: Sequence[Subject]
    out: AnyPath | None
    figures: AnyPath | None
    force: bool


@boundary
def report(
    named: AnyPath | Sequence[AnyPath],
    *,
    out: AnyPath | None = None,
    figures: AnyPath | None = None,
    force: bool = False,
    more: Sequence[Section] = (),
    progress: Progress = silent,
    **budget: Any,
) -> Report:
    """Picture one or several scores files or patches.

    Parameters
    ----------
    named:
        Scores files and patches.
    out:
        Where to write the page, one HTML file that opens from disk. None: no page.
    figures:
        A folder to write each figure to: PNG, SVG and CSV. None: none.
    force:
        Replace ``out`` and ``figures`` if they exist.
    more:
        Sections to add at the end, such as `neftsurgery.neuron_utilization.figures.section_of` makes.
    progress:
        Told of the budgets chosen for and the figures drawn.
    **budget:
        Which neurons of the scores count as sensitive, as `neftsurgery.Scores.select`; by default
        ``neurons="3%"``.

    Returns
    -------
    Report
        ``describe()`` gives all its numbers, ``figures`` its figures.

    Raises
    ------
    UsageError
        For a file that is neither, options that make no sense, an output that exists, or where
        matplotlib or jinja2 is needed and not installed.
    MismatchError
        If no neuron can be chosen.
    CorruptFileError
        If a file is damaged.
    MachineError
        If something cannot be read or written.
    """
    names = [named] if isinstance(named, str | os.PathLike) else list(named)
    plan = plan_report(names, budget, out=out, figures=figures, force=force)
    return make(plan, more=more, progress=progress)


def plan_report(
    named: Sequence[AnyPath],
    budget: dict[str, Any],
    *,
    out: AnyPath | None = None,
    figures: AnyPath | None = None,
    force: bool = False,
    inputs: Sequence[AnyPath] = (),
) -> ReportPlan:
    """Open, check and choose; the parameters and errors are those of `report`.

    ``inputs`` are what sections are about that will be added: no output may replace it, and there may be
    nothing else to report on.
    """
    for path, kind in ((out, "file"), (figures, "directory")):
        if path is not None:
            require_matplotlib()
            refuse_output(
                path, inputs=[*named, *inputs], force=force, kind="file" if kind == "file" else "directory"
            )
    if out is not None and figures is not None:
        _refuse_nested(Path(os.path.realpath(out)), Path(os.path.realpath(figures)))
    like = budget.get("like")
    if isinstance(like, Selection):
        budget = budget | {"like": like.counts}
    sizes = ("neurons", "params", "threshold", "changed", "like")
    if not any(budget.get(name) for name in sizes if name != "threshold") and budget.get("threshold") is None:
        budget = budget | {"neurons": _DEFAULT}
    amounts = Budget.of(**budget)
    subjects = open_subjects(named, amounts) if named or not inputs else ()
    return ReportPlan(subjects, out, figures, force)


def _refuse_nested(page: Path, folder: Path) -> None:
    if folder == page or folder in page.parents:
        raise UsageError(
            "the page would lie inside the folder of figures, which is written as a whole",
            file=page,
            hint="name a page beside the folder",
        )


def make(plan: ReportPlan, *, more: Sequence[Section] = (), progress: Progress = silent) -> Report:
    """Carry out a planned report, with ``more`` sections at its end."""
    names = ", ".join(text.label(subject.name, 40) for subject in plan.subjects[:4])
    others = len(plan.subjects) - 4
    title = names + (f" and {others} more" if others > 0 else "") if names else more[0].title
    with progress("computing", steps(plan.subjects)) as step:
        made = Report(title, (*sections_of(plan.subjects, step), *more))
    if plan.out is not None:
        with progress("drawing", len(made.figures)) as step:
            page = made.html(step).encode("utf-8", "backslashreplace")
        with staged_file(plan.out, force=plan.force) as staged:
            staged.write_at(page, 0)
    if plan.figures is not None:
        with (
            progress("writing figures", len(made.figures)) as step,
            staged_directory(plan.figures, force=plan.force) as folder,
        ):
            made.write_figures(folder, step)
    return made
