"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Progress", "Timing", "silent"]


class Progress(Protocol):
    """Opens a stage of ``total`` bytes; yields a function to be told of bytes done."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin the stage ``what``; it ends with the context."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody watches."""
    yield lambda done: None


@dataclass(slots=True)
class Timing:
    """What the work took.

    Attributes
    ----------
    bytes_read:
        Bytes of weights read.
    seconds:
        From the first weight byte asked for to the last result.
    """

    bytes_read: int = 0
    seconds: float = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Add the time the context takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def process_seconds() -> float:
    """Seconds since this process was started, by the system's account where it keeps one."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter()
