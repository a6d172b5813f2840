"""Where a command prints: results, or one JSON object, on stdout; everything else on stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import spelled
from ..progress import Timing
from ..text import lines, printable

if TYPE_CHECKING:
    from ..storage.threads import Limits
    from ..surgery.verb import Running

__all__ = ["Console", "can_print", "flag", "table"]


def flag(name: str, value: str | None) -> str:
    """An option of a message as the command line spells it."""
    if name == "out":
        return "-o OUT"
    spelled = f"--{name.replace('_', '-')}"
    if value is None or value == "True":
        return spelled
    if value == "...":
        return f"{spelled} {'GLOB=N' if name == 'axis' else name.upper()}"
    return f"{spelled} {shlex.quote(value)}"


class Console:
    """Where a command prints."""

    def __init__(self, *, as_json: bool, quiet: bool, limits: Limits) -> None:
        self.as_json = as_json  # print one JSON object, and nothing else, on stdout
        self.quiet = quiet  # print errors only
        self.limits = limits

    @property
    def running(self) -> Running:
        """The keywords of the ``run`` of a plan."""
        return {"limits": self.limits, "progress": self.progress}

    def say(self, *texts: str) -> None:
        """Print lines of the result, for people; without any, an empty one."""
        if not (self.as_json or self.quiet):
            click.echo(lines(texts))

    def say_table(
        self,
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[int] = (),
        shown: int | None = None,
        rest: str = "more",
    ) -> None:
        """Print rows as aligned columns, of many the first ``shown``; see `table`."""
        for line in table(rows[:shown], right=right):
            self.say(line)
        if shown is not None and len(rows) > shown:
            self.say(f"  and {len(rows) - shown:,} {rest}")

    @property
    def is_terminal(self) -> bool:
        """Whether results are printed on a terminal."""
        return not (self.as_json or self.quiet) and sys.stdout.isatty()

    def note(self, text: str) -> None:
        """Print a remark beside the result, on stderr, as one line."""
        if not self.quiet:
            click.echo(printable(spelled(text, flag)), err=True)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print the warnings of a plan."""
        for warning in warnings:
            self.note(f"warning: {warning}")

    def answer(
        self, facts: Mapping[str, Any], timing: Timing | None = None, *, dry_run: bool | None = None
    ) -> None:
        """Print the result as JSON, if asked to, with bytes and seconds. A dry run has no ``out``."""
        if not self.as_json:
            return
        facts = dict(facts)
        if "warnings" in facts:
            facts["warnings"] = [spelled(warning, flag) for warning in facts["warnings"]]
        if dry_run is not None:
            facts["dry_run"] = dry_run
            if dry_run and "out" in facts:
                facts["out"] = None
        if timing is not None:
            facts = facts | {
                "bytes_read": timing.bytes_read,
                "seconds": round(timing.seconds, 6),
                "wall_seconds": round(_process_seconds(), 6),
            }
        click.echo(json.dumps(facts, allow_nan=False))

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal; see `neftsurgery.progress.Progress`."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda done: None
            return
        from tqdm import tqdm

        scale = unit == "B"
        with tqdm(total=total, desc=what, unit=unit, unit_scale=scale, leave=False, file=sys.stderr) as bar:
            yield bar.update


def _process_seconds() -> float:
    """Seconds since this process was started, or since Python was where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter()


def can_print(text: str) -> bool:
    """Whether stdout's encoding has all characters of ``text``."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Lines of aligned columns; those in ``right`` are flush right."""
    if not rows:
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()
