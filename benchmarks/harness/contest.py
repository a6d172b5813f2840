"""Contestants take turns, A B C A B C, so that the drift of a machine hits all alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from benchmarks.harness.process import CommandError, Run, run

# A plan is ours too, but handles no weights: it has no throughput.
Role = Literal["ours", "plan", "limit", "rival"]
KEPT = ("bytes_read", "neurons", "selected", "threads", "buffer")  # of what a command printed


def nothing() -> None:
    """Before or after a run: nothing to do."""


@dataclass(frozen=True)
class Contestant:
    """A command in a contest; ``before`` and ``after`` each run are not timed.

    ``rounds`` bounds the rounds of a slow one; ``needs`` are the packages it cannot run without; ``facts``
    are kept with the result.
    """

    name: str
    role: Role
    command: Sequence[str]
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing
    rounds: int | None = None
    needs: tuple[str, ...] = ()
    facts: dict[str, int] = field(default_factory=dict)


def compete(contestants: Iterable[Contestant], rounds: int) -> list[dict[str, Any]]:
    """Runs every contestant once a round; returns per contestant its name, role and runs, run i of round i.

    One that cannot run is skipped, with the sentence that says why: the others go on.
    """
    entries = [_Entry(contestant) for contestant in contestants]
    for number in range(rounds):
        for entry in entries:
            entry.take_turn(number, rounds)
    return [entry.result() for entry in entries]


class _Entry:
    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.runs: list[Run] = []
        missing = [name for name in contestant.needs if find_spec(name) is None]
        self.skipped = f"not installed: {', '.join(missing)}" if missing else None

    def take_turn(self, number: int, rounds: int) -> None:
        who = self.contestant
        if self.skipped or number >= (who.rounds or rounds):
            return
        try:
            who.before()
            self.runs.append(run(who.command))
            who.after()
        except CommandError as failure:
            self.skipped = f"failed: {failure.reason}"
            say(f"    {who.name}: {failure}")
            return
        last = self.runs[-1]
        say(f"    {number + 1}/{rounds}  {last.wall:8.2f} s  {last.peak / 1e6:7.0f} MB  {who.name}")

    def result(self) -> dict[str, Any]:
        return {
            "name": self.contestant.name,
            "role": self.contestant.role,
            "skipped": self.skipped,
            **self.contestant.facts,
            "runs": [_slim(one) for one in self.runs],
        }


def _slim(one: Run) -> dict[str, Any]:
    """A run as it is stored: times to 0.1 ms, and of the printed object only what was done."""
    kept = {key: one.printed[key] for key in KEPT if key in one.printed}
    times = {key: round(value, 4) for key, value in asdict(one).items() if isinstance(value, float)}
    return asdict(one) | times | {"printed": kept}


def say(line: str) -> None:
    """A progress line."""
    print(line, file=sys.stderr, flush=True)
