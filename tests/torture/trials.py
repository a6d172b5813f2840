"""Counts how often each fault was tried, and how often it broke a promise. The page's table shows this."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["TIMES", "Trials", "times"]

#: How often to try each fault; 0: as often as a short test does.
TIMES = int(os.environ.get("NEFT_TORTURE", "0"))


def times(short: int, share: float = 1.0) -> int:
    """How often to try a fault: ``short`` in a test, ``share`` of ``NEFT_TORTURE`` in a longer run."""
    return max(short, int(share * TIMES))


@dataclass
class Entry:
    """One fault: how often it was tried, how often it broke a promise, and other counts."""

    tried: int = 0
    losses: int = 0
    notes: dict[str, int] = field(default_factory=dict)


class Trials:
    """Counts trials by ``(fault, work)``: what went wrong, and which command was running."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def entry(self, fault: str, work: str) -> Entry:
        return self.entries.setdefault((fault, work), Entry())

    @contextmanager
    def trial(self, fault: str, work: str) -> Iterator[Entry]:
        """One trial. An exception inside counts as a loss, and fails the test too."""
        entry = self.entry(fault, work)
        entry.tried += 1
        try:
            yield entry
        except BaseException:
            entry.losses += 1
            raise

    def write(self, path: Path) -> None:
        """Add this run's entries to a JSON file."""
        rows = [
            {"fault": fault, "work": work, "tried": e.tried, "losses": e.losses, "notes": e.notes}
            for (fault, work), e in self.entries.items()
        ]
        path.write_text(json.dumps(rows, indent=1) + "\n")
