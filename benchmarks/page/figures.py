"""Figures of raw runs: medians with their range, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

Run = dict[str, Any]
Entry = dict[str, Any]  # a contestant: name, role, skipped, runs
Group = dict[str, Any]  # label, bytes, contestants
Figure = Callable[..., float]  # of a run


@dataclass(frozen=True)
class Spread:
    """The median of some figures, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread | None:
        """None of no figures."""
        found = sorted(figures)
        return cls(median(found), found[0], found[-1]) if found else None

    def __format__(self, spec: str) -> str:
        """``1.02 (0.98 to 1.10)``: the spec formats each figure; one figure has no range."""
        middle, least, most = (format(x, spec) for x in (self.median, self.least, self.most))
        return middle if least == most else f"{middle} ({least} to {most})"


def wall(run: Run) -> float:
    """Seconds of the whole process."""
    return float(run["wall"])


def work(run: Run) -> float:
    """Seconds of the work alone: without start and imports where the process tells, else the whole."""
    return float(run["wall"] if run["seconds"] is None else run["seconds"])


def peak(run: Run) -> float:
    """Most resident bytes."""
    return float(run["peak"])


def spread(entry: Entry | None, figure: Figure) -> Spread | None:
    """A figure over an entry's runs."""
    return Spread.of(figure(run) for run in entry["runs"]) if entry else None


def ratio(over: Entry | None, under: Entry | None, figure: Figure = work) -> Spread | None:
    """``over / under`` of the runs of each round: what drifts from round to round cancels."""
    if not over or not under:
        return None
    pairs = zip(over["runs"], under["runs"], strict=False)  # slow rivals leave the later rounds out
    return Spread.of(figure(a) / figure(b) for a, b in pairs)


def first(group: Group, role: str) -> Entry | None:
    """The first entry with this role that ran: the one others are compared with."""
    return next(
        (entry for entry in group.get("contestants", []) if entry["role"] == role and entry["runs"]), None
    )


def limit(group: Group) -> Entry | None:
    """The limit: of every round the run of the fastest limit in it."""
    entries = [entry for entry in group.get("contestants", []) if entry["role"] == "limit" and entry["runs"]]
    rounds = zip(*(entry["runs"] for entry in entries), strict=False)
    return (
        {"name": "the limit", "role": "limit", "runs": [min(runs, key=work) for runs in rounds]}
        if entries
        else None
    )


def named(group: Group, start: str) -> Entry | None:
    """The entry whose name starts so, if it ran."""
    entries = group.get("contestants", [])
    return next((entry for entry in entries if entry["name"].startswith(start) and entry["runs"]), None)
