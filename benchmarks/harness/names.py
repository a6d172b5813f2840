"""Options that name some of the things that a benchmark measures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable


def some_of(known: Iterable[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """The type of an option: known names (each a ``what``) between commas, put in the order of ``known``."""
    names = tuple(known)

    def read(text: str) -> tuple[str, ...]:
        given = set(text.split(","))
        if unknown := given - set(names):
            raise argparse.ArgumentTypeError(f"no such {what}: {', '.join(sorted(unknown))}")
        return tuple(name for name in names if name in given)

    return read
