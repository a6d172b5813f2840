"""How long work tells how far it is, without knowing who listens, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self


class Progress(Protocol):
    """Opens a stage of ``total`` bytes; yields a function to be told of bytes done."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Begin the stage ``what``; it ends with the context."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody watches."""
    yield lambda done: None


@dataclass(frozen=True, slots=True)
class Timing:
    """What the work took."""

    bytes_read: int = 0  # of weights: of checkpoints, and of the values of patches
    seconds: float = 0.0  # from the first weight byte asked for to the last result

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.bytes_read + other.bytes_read, self.seconds + other.seconds)


class ReadCounter(Protocol):
    """Tells how many bytes were read of something."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read so far."""


class Stopwatch:
    """Measures what the work in its context takes, and reads of ``sources``."""

    def __init__(self, *sources: ReadCounter) -> None:
        self._sources = sources
        self.bytes_read = -self._read()
        self._start = self._seconds = 0.0

    def _read(self) -> int:
        return sum(source.bytes_read for source in self._sources)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._start

    @property
    def timing(self) -> Timing:
        """What was measured so far."""
        return Timing(self.bytes_read + self._read(), self._seconds)
