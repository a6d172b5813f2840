"""Progress lines of a measurement, on stderr."""

from __future__ import annotations

import sys


def log(line: str) -> None:
    """Prints a progress line."""
    print(line, file=sys.stderr, flush=True)
