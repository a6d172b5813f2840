"""A side-by-side run: contestants take turns, A B C A B C, so that drift of the machine affects all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from benchmarks.harness.log import log
from benchmarks.harness.process import CommandError, Run, run

# A plan is this tool's too, but reads no weights: it has no throughput.
Role = Literal["ours", "plan", "limit", "rival"]
KEPT = ("bytes_read", "neurons", "selected", "threads", "buffer")  # keys kept of what a command printed


def do_nothing() -> None:
    """The default of ``before`` and ``after``."""


@dataclass(frozen=True)
class Contestant:
    """A command in a side-by-side run. ``before`` and ``after`` each run are not timed.

    ``rounds`` limits the rounds of a slow contestant; ``needs`` lists the packages it requires; ``facts``
    are stored with the result.
    """

    name: str
    role: Role
    command: Sequence[str]
    before: Callable[[], None] = do_nothing
    after: Callable[[], None] = do_nothing
    rounds: int | None = None
    needs: tuple[str, ...] = ()
    facts: dict[str, int] = field(default_factory=dict)


def run_side_by_side(contestants: Iterable[Contestant], rounds: int) -> list[dict[str, Any]]:
    """Runs every contestant once per round. Returns name, role and runs of each; run i belongs to round i.

    A contestant that cannot run is skipped, with the reason. The others continue.
    """
    entries = [_Entry(contestant) for contestant in contestants]
    for number in range(rounds):
        for entry in entries:
            entry.take_turn(number, rounds)
    return [entry.result() for entry in entries]


def run_group(label: str, nbytes: int, contestants: Iterable[Contestant], rounds: int) -> dict[str, Any]:
    """A side-by-side run as a group of a part: its label, the bytes that are read or written, the results."""
    return {"label": label, "bytes": nbytes, "contestants": run_side_by_side(contestants, rounds)}


class _Entry:
    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.runs: list[Run] = []
        missing = [name for name in contestant.needs if find_spec(name) is None]
        self.skipped = f"not installed: {', '.join(missing)}" if missing else None

    def take_turn(self, number: int, rounds: int) -> None:
        contestant = self.contestant
        if self.skipped or number >= (contestant.rounds or rounds):
            return
        try:
            contestant.before()
            self.runs.append(run(contestant.command))
            contestant.after()
        except CommandError as failure:
            self.skipped = f"failed: {failure.reason}"
            log(f"    {contestant.name}: {failure}")
            return
        last = self.runs[-1]
        log(f"    {number + 1}/{rounds}  {last.wall:8.2f} s  {last.peak / 1e6:7.0f} MB  {contestant.name}")

    def result(self) -> dict[str, Any]:
        return {
            "name": self.contestant.name,
            "role": self.contestant.role,
            "skipped": self.skipped,
            **self.contestant.facts,
            "runs": [_stored(one) for one in self.runs],
        }


def _stored(one: Run) -> dict[str, Any]:
    """A run as it is stored: times to 0.1 ms, and of the printed object only the keys in `KEPT`."""
    kept = {key: one.printed[key] for key in KEPT if key in one.printed}
    times = {key: round(value, 4) for key, value in asdict(one).items() if isinstance(value, float)}
    return asdict(one) | times | {"printed": kept}
