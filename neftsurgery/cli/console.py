"""Where a command prints: results, or one JSON object, on stdout; everything else on stderr.

What cannot be printed is lost, and the command goes on: a reader may leave (``| head``), a log may be on a
full disk, a parent process may have closed the streams. The files that a command writes matter as before.
"""

from __future__ import annotations

import errno
import io
import json
import os
import select
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..errors import MachineError, spelled
from ..progress import Timing
from ..sources.hub_errors import redacted
from ..text import lines, printable

if TYPE_CHECKING:
    from ..storage.threads import Limits
    from ..surgery.verb import Running


def flag(name: str, value: str | None) -> str:
    """An option of a message as the command line spells it."""
    if name == "out":
        return "-o OUT"
    spelled = f"--{'dask' if name == 'executor' else name.replace('_', '-')}"
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
        self._bar: Any = None  # the progress bar that is shown

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
        if self.as_json or self.quiet or not sys.stdout.isatty():
            self.say(*table(rows[:shown], right=right))
        else:
            _print_table(rows[:shown], right)
        if shown is not None and len(rows) > shown:
            self.say(f"  and {len(rows) - shown:,} {rest}")

    def note(self, text: str) -> None:
        """Print a remark beside the result, on stderr, as one line."""
        if not self.quiet:
            remark(redacted(printable(spelled(text, flag))), self._bar)

    def report(self, where: str, text: str) -> None:
        """Show figures of work under way: in its bar, or as a line where there is none."""
        if self._bar is None:
            self.note(f"{where}: {text}")
        else:
            self._bar.update(self._bar.task_ids[0], figures=text)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print the warnings of a plan."""
        for warning in warnings:
            self.note(f"warning: {warning}")

    def carry_out(self, plan: Any, dry_run: bool) -> Any:
        """Print a plan's warnings, and run it; returns its result, or on a dry run the plan itself."""
        self.warn(plan.warnings)
        return plan if dry_run else plan.run(**self.running)

    def answer(
        self, facts: Mapping[str, Any], timing: Timing | None = None, *, dry_run: bool | None = None
    ) -> None:
        """Print the result as JSON, if asked to, with bytes and seconds. A dry run has no ``out``."""
        from ..sources.remote import FETCHED

        if not self.as_json:
            return
        facts = dict(facts)
        if "warnings" in facts:
            facts["warnings"] = [spelled(warning, flag) for warning in facts["warnings"]]
        if dry_run is not None:
            facts["dry_run"] = dry_run
            if dry_run and "out" in facts:
                facts["out"] = None
        if FETCHED:
            facts["fetched"] = [{"url": f.url, "bytes": f.nbytes, "of": f.of} for f in FETCHED]
        if timing is not None:
            facts = facts | {
                "bytes_read": timing.bytes_read,
                "seconds": round(timing.seconds, 6),
                "wall_seconds": round(_process_seconds(), 6),
            }
        text = json.dumps(facts, allow_nan=False)
        click.echo(redacted(text) if FETCHED else text)

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
        """Show a bar on a terminal; see `neftsurgery.progress.Progress`."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda done: None
            return
        from rich import progress
        from rich.console import Console as Terminal

        amounts = (
            (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if unit == "B"
            else (progress.MofNCompleteColumn(), progress.TextColumn(f"{unit}s"))
        )
        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(24), *amounts,
            progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        with progress.Progress(*columns, console=Terminal(stderr=True), transient=True) as self._bar:
            task = self._bar.add_task(what, total=total, figures="")
            try:
                yield partial(self._bar.advance, task)
            finally:
                self._bar = None


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


def _print_table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    """Print the table on a terminal, within its width: long names are folded, and numbers are coloured."""
    from rich.console import Console as Terminal
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    columns = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0]) if rows else 0):
        is_number = column in right
        columns.add_column(
            justify="right" if is_number else "left", no_wrap=is_number, overflow="fold",
            style="cyan" if is_number else None,
        )  # fmt: skip
    for row in rows:
        columns.add_row(*(Text(printable(cell)) for cell in row))
    Terminal().print(Padding(columns, (0, 0, 0, 2)))


def remark(text: str, bar: Any = None) -> None:
    """Print a remark on stderr, above the bar if there is one; errors and warnings in colour."""
    if not sys.stderr.isatty():
        click.echo(text, err=True)
        return
    from rich.console import Console as Terminal
    from rich.text import Text

    kind = text.partition(":")[0]
    style = {"warning": "yellow", "neftsurgery": "bold red"}.get(kind, "")
    terminal = Terminal(stderr=True) if bar is None else bar.console
    terminal.print(Text.assemble((kind, style), text[len(kind) :]), soft_wrap=True)


class _LossyFile(io.FileIO):
    """A file open for writing. The first error is kept, not raised, and nothing is written after it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while self.error is None:
                if (written := super().write(data)) is not None:
                    return written
                select.select((), (self,), ())  # the pipe is full, and the descriptor does not block
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes


@contextmanager
def lossy_streams() -> Iterator[Callable[[], MachineError | None]]:
    """Within the context, printing raises no error, whatever the standard streams are.

    Yields a function that tells what stdout lost; that its reader has left is not a loss. Streams that were
    replaced, as by a test, stay as they are.
    """
    _open_closed_descriptors()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # for as long as the process lives
    raw, sys.stdout = _lossy(sys.stdout, sys.__stdout__)
    _, sys.stderr = _lossy(sys.stderr, sys.__stderr__)

    def lost() -> MachineError | None:
        sys.stdout.flush()
        if raw is None or raw.error is None or raw.error.errno == errno.EPIPE:
            return None
        return MachineError(
            f"{(raw.error.strerror or str(raw.error)).lower()}: what was printed is lost",
            file="standard output",
            hint="the command itself has succeeded",
        )

    try:
        yield lost
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Give the numbers 0 to 2 to the null device where they are free: no output file may get one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


def _lossy(stream: TextIO | None, original: TextIO | None) -> tuple[_LossyFile | None, Any]:
    """The stream as one that loses what cannot be written; as it is if it is not the process's own."""
    if stream is not None and stream is not original:
        return None, stream
    raw = _LossyFile(os.devnull if stream is None else stream.fileno(), "w", closefd=stream is None)
    encoding = "utf-8" if stream is None else stream.encoding
    return raw, io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
