"""How often each fault was tried, and how often a promise was broken by it: what the table is made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["TIMES", "Ledger", "times"]

#: How often to try each fault; 0: as a short test does.
TIMES = int(os.environ.get("NEFT_TORTURE", "0"))


def times(short: int, share: float = 1.0) -> int:
    """How often to try a fault: ``short`` in a test, ``share`` of ``NEFT_TORTURE`` in a longer run."""
    return max(short, int(share * TIMES))


@dataclass
class Entry:
    """One fault: times tried, times that something was lost, and what it says beside these."""

    tried: int = 0
    losses: int = 0
    notes: dict[str, int] = field(default_factory=dict)


class Ledger:
    """Counts trials by ``(what was done to it, what it was doing)``."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def entry(self, fault: str, work: str) -> Entry:
        return self.entries.setdefault((fault, work), Entry())

    @contextmanager
    def trial(self, fault: str, work: str) -> Iterator[Entry]:
        """One trial. Whatever is raised inside is a loss, and fails the test as well."""
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
