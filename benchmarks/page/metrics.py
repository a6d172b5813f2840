"""Metrics of raw runs: medians with their range, and ratios within rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

Run = dict[str, Any]
Entry = dict[str, Any]  # a contestant: name, role, skipped, runs
Group = dict[str, Any]  # label, bytes, contestants
Metric = Callable[..., float]  # computes a figure of a run


@dataclass(frozen=True)
class Spread:
    """The median, minimum and maximum of some figures."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread | None:
        """None if there are no figures."""
        found = sorted(figures)
        return cls(median(found), found[0], found[-1]) if found else None

    def __format__(self, spec: str) -> str:
        """``1.02 (0.98 to 1.10)``: the spec formats each figure; a single figure has no range."""
        median, minimum, maximum = (format(x, spec) for x in (self.median, self.minimum, self.maximum))
        return median if minimum == maximum else f"{median} ({minimum} to {maximum})"


def wall(run: Run) -> float:
    """Seconds of the whole process."""
    return float(run["wall"])


def work(run: Run) -> float:
    """Seconds without start and imports, where the process reports them; else of the whole process."""
    return float(run["wall"] if run["seconds"] is None else run["seconds"])


def peak(run: Run) -> float:
    """Peak resident bytes."""
    return float(run["peak"])


def spread(entry: Entry | None, metric: Metric) -> Spread | None:
    """A metric over an entry's runs."""
    return Spread.of(metric(run) for run in entry["runs"]) if entry else None


def ratio(over: Entry | None, under: Entry | None, metric: Metric = work) -> Spread | None:
    """``over / under`` within each round, so that drift between rounds cancels."""
    if not over or not under:
        return None
    pairs = zip(over["runs"], under["runs"], strict=False)  # slow rivals skip the later rounds
    return Spread.of(metric(a) / metric(b) for a, b in pairs)


def first(group: Group, role: str) -> Entry | None:
    """The first entry with this role that ran: the others are compared with it."""
    return next(
        (entry for entry in group.get("contestants", []) if entry["role"] == role and entry["runs"]), None
    )


def limit(group: Group) -> Entry | None:
    """The limit: for each round, the run of the fastest limit in it."""
    entries = [entry for entry in group.get("contestants", []) if entry["role"] == "limit" and entry["runs"]]
    rounds = zip(*(entry["runs"] for entry in entries), strict=False)
    fastest = [min(runs, key=work) for runs in rounds]
    return {"name": "the limit", "role": "limit", "runs": fastest} if entries else None


def named(group: Group, start: str) -> Entry | None:
    """The entry whose name starts with ``start``, if it ran."""
    entries = group.get("contestants", [])
    return next((entry for entry in entries if entry["name"].startswith(start) and entry["runs"]), None)
