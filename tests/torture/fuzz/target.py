"""A reader of untrusted files, with valid seeds and with what must hold if it accepts a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neftsurgery.errors import NeftError

from .mutate import Mutator

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes
    ----------
    name:
        What it reads.
    path:
        The file an input is written to.
    seeds:
        Valid inputs.
    mutate:
        How inputs are changed.
    read:
        Reads the file at ``path``. Returns if the reader accepts it, else raises what the reader raises. Also
        gets the input, to compare with an oracle.
    share:
        The target's share of a run's inputs, relative to other targets: larger for fast readers.
    refusals:
        The errors that it may refuse an input with.
    """

    name: str
    path: Path
    seeds: Sequence[bytes]
    mutate: Mutator
    read: Callable[[bytes], None]
    share: float = 1.0
    refusals: tuple[type[Exception], ...] = (NeftError,)
