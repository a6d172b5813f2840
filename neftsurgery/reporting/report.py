"""The verb ``report``: figures of scores files and patches, as one HTML page, as files, as numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import text
from ..errors import UsageError, boundary
from ..progress import Progress, silent
from ..selection.budget import Budget
from ..storage.output import staged_directory, staged_file
from ..storage.output_checks import AnyPath, refuse_output
from ..version import __version__, install_command
from .figure import Cell, Column, ReportFigure, Table
from .inputs import ReportInput, open_inputs
from .plotting import COLOURS, require_matplotlib, themed_svg
from .sections import ReportSection, sections_of

#: The page shows this many rows of a table. The CSV and the JSON have all of them.
_MAX_ROWS = 300
_DEFAULT_NEURONS = "3%"
_TITLE_NAMES = 4


def _rows(table: Table) -> Iterator[tuple[dict[str, Any], ...]]:
    """The cells of a table's first rows: text, whether it is a number, and the length of its bar."""
    return zip(*map(_cells, table.columns, zip(*table.rows, strict=True)), strict=True)


def _cells(column: Column, values: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    sizes = [abs(one) if isinstance(one, int | float) and one == one else None for one in values]
    top = max((size for size in sizes if size is not None), default=0) if column.bar else 0
    for value, size in zip(values[:_MAX_ROWS], sizes, strict=False):
        bar = None if size is None or not top else round(100 * size / top, 1)
        yield {"text": column.show(value), "number": column.is_number, "bar": bar}


@dataclass(frozen=True, repr=False)
class Report:
    """A report: its sections with all their numbers and figures."""

    title: str  # the title of the page
    sections: tuple[ReportSection, ...]  # the sections in the order of the page

    def __repr__(self) -> str:
        counts = text.plural(len(self.sections), "section"), text.plural(len(self.figures), "figure")
        return f"Report({self.title}: {', '.join(counts)})"

    @cached_property
    def figures(self) -> dict[str, ReportFigure]:
        """All figures by id."""
        return {figure.id: figure for section in self.sections for figure in section.figures}

    def html(self, *, progress: Progress = silent) -> str:
        """The page as text, all that comes from files escaped.

        Raises a UsageError if matplotlib or jinja2 is not installed.
        """
        try:
            from jinja2 import Environment, PackageLoader, StrictUndefined
            from markupsafe import Markup
        except ImportError as error:
            hint = install_command("report")
            raise UsageError("the page needs jinja2, which is not installed", hint=hint) from error
        environment = Environment(
            loader=PackageLoader(__package__, ""),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

        def image(figure: ReportFigure) -> Markup:
            drawn = themed_svg(figure.svg(), figure.id, figure.title)
            advance(1)
            return Markup(drawn)  # the XML writer has escaped it

        with progress("drawing", len(self.figures)) as advance:
            return environment.get_template("page.html.j2").render(
                title=self.title,
                sections=self.sections,
                image=image,
                rows=_rows,
                max_rows=_MAX_ROWS,
                colours=COLOURS,
                version=__version__,
            )

    def describe(self) -> dict[str, object]:
        """The report as JSON: what each section is about, and the numbers of each figure."""
        return {
            "sections": [
                {"id": section.id, **section.data, "figures": [figure.id for figure in section.figures]}
                for section in self.sections
            ],
            "figures": {name: figure.describe() for name, figure in self.figures.items()},
        }

    def write_figures(self, folder: Path, *, progress: Progress = silent) -> None:
        """Write each figure into an existing folder: ``ID.png``, ``ID.svg`` and ``ID.csv``."""
        with progress("writing figures", len(self.figures)) as advance:
            for name, figure in self.figures.items():
                if figure.draw is not None:
                    (folder / f"{name}.png").write_bytes(figure.png())
                    (folder / f"{name}.svg").write_text(figure.svg(), encoding="utf-8")
                # A name can hold half of a surrogate pair, which UTF-8 cannot encode.
                (folder / f"{name}.csv").write_bytes(figure.table.csv().encode("utf-8", "backslashreplace"))
                advance(1)


@dataclass(frozen=True, repr=False)
class ReportPlan:
    """A planned report: the inputs are open and checked, the neurons are chosen, nothing is written."""

    inputs: tuple[ReportInput, ...]  # the scores files and patches
    out: AnyPath | None  # where the page is written; None: not at all
    figures: AnyPath | None  # the folder of figures
    force: bool  # whether to replace existing ones

    def __repr__(self) -> str:
        names = ", ".join(entry.name for entry in self.inputs)
        outputs = [os.fspath(path) for path in (self.out, self.figures) if path is not None]
        return text.printable(f"ReportPlan({names} -> {', '.join(outputs) or 'nothing written'})")

    def describe(self) -> dict[str, object]:
        """The plan as JSON."""
        return {
            "subjects": [entry.name for entry in self.inputs],
            "out": None if self.out is None else os.fspath(self.out),
            "figures_folder": None if self.figures is None else os.fspath(self.figures),
        }

    @boundary
    def run(self, *, more: Sequence[ReportSection] = (), progress: Progress = silent) -> Report:
        """Compute the report with ``more`` sections at its end, and write its page and its figures."""
        names = [text.label(entry.name, 40) for entry in self.inputs]
        title = text.some(names, _TITLE_NAMES) if names else more[0].title
        made = Report(title, (*sections_of(self.inputs, progress), *more))
        if self.out is not None:
            page = made.html(progress=progress).encode("utf-8", "backslashreplace")
            with staged_file(self.out, force=self.force) as staged:
                staged.write_at(page, 0)
        if self.figures is not None:
            with staged_directory(self.figures, force=self.force) as folder:
                made.write_figures(folder, progress=progress)
        return made


def report(
    named: AnyPath | Sequence[AnyPath],
    *,
    out: AnyPath | None = None,
    figures: AnyPath | None = None,
    force: bool = False,
    more: Sequence[ReportSection] = (),
    progress: Progress = silent,
    **budget: Any,
) -> Report:
    """Report on scores files and patches; ``describe()`` returns all numbers, ``figures`` the figures.

    Args:
        named: One or several scores files and patches.
        out: Where to write the page, one HTML file that opens from disk. None: no page.
        figures: A folder for the figures, each as PNG, SVG and CSV. None: no figures.
        force: Replace ``out`` and ``figures`` if they exist.
        more: Sections to append, such as those of `neftsurgery.neuron_utilization.report_section`.
        progress: Called for the budgets and the figures.
        **budget: Which neurons of the scores count as sensitive: the keywords of `neftsurgery.Scores.select`.
            The default is ``neurons="3%"``.

    Raises:
        UsageError: If a file is neither scores nor a patch, options do not go together, an output exists, or
            a package is not installed.
        MismatchError: If no neuron can be chosen.
        CorruptFileError, MachineError: If a file is damaged; if something cannot be read or written.
    """
    plan = plan_report(named, out=out, figures=figures, force=force, **budget)
    return plan.run(more=more, progress=progress)


@boundary
def plan_report(
    named: AnyPath | Sequence[AnyPath],
    *,
    out: AnyPath | None = None,
    figures: AnyPath | None = None,
    force: bool = False,
    other_inputs: Sequence[AnyPath] = (),
    **budget: Any,
) -> ReportPlan:
    """Open the inputs of `report`, and choose neurons; ``other_inputs``: those of sections to append."""
    paths = [named] if isinstance(named, str | os.PathLike) else list(named)
    if out is not None or figures is not None:
        require_matplotlib()
    refuse_output(out, inputs=[*paths, *other_inputs], force=force, kind="file")
    refuse_output(figures, inputs=[*paths, *other_inputs], force=force, kind="directory")
    if out is not None and figures is not None:
        page, folder = Path(os.path.realpath(out)), Path(os.path.realpath(figures))
        if page.is_relative_to(folder):
            raise UsageError(
                "the page would be inside the folder of figures, which is replaced as a whole",
                file=page,
                hint="name a page outside of that folder",
            )
    given = any(budget.get(name) for name in ("neurons", "params", "changed", "like"))
    default = {} if given or budget.get("threshold") is not None else {"neurons": _DEFAULT_NEURONS}
    chosen_budget = Budget.of(**(budget | default))
    inputs = open_inputs(paths, chosen_budget) if paths or not other_inputs else []
    return ReportPlan(tuple(inputs), out, figures, force)
