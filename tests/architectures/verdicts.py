"""What a model type got in one column of the table of `make architectures`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from neftsurgery.errors import NeftError, spelled

__all__ = ["Column", "Wrong", "judged", "plain", "sentence", "starred"]

_PATH = re.compile(r"(?<![\w.])[\w*]+(\.[\w*]+)+|(?<=neurons of )[\w.]+(?= cannot)|\S*/\S+")


class Wrong(Exception):
    """The product did something else than it should: the first tensor, and why."""


@dataclass
class Column:
    """One verdict: ``right``, ``part``, ``refused``, ``wrong`` or ``not run``.

    ``part`` is right, and something was refused by name.
    """

    verdict: str = "not run"
    why: str = ""
    left: dict[str, list[Any]] = field(default_factory=dict)  # a sentence: how many tensors, the first
    counts: dict[str, int] = field(default_factory=dict)

    def leave(self, error: NeftError | str, name: str, count: int = 1) -> None:
        """Record that a tensor was refused or left out by name."""
        told = sentence(error) if isinstance(error, NeftError) else error
        self.left.setdefault(told, [0, name])[0] += count

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def sentence(error: NeftError) -> str:
    """What an error says, without what is true of one tensor only."""
    return plain(spelled(error.what, lambda name, value: name))


def plain(text: str) -> str:
    """A sentence without the names of tensors, modules and files."""
    return _PATH.sub("…", text)


def starred(name: str) -> str:
    """A name with its numbers as stars."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


@contextmanager
def judged(column: Column) -> Iterator[Column]:
    """Fill the verdict by what happens in the block; nothing is raised."""
    try:
        yield column
        if column.verdict == "not run" and not column.why:
            column.verdict = "part" if column.left else "right"
    except Wrong as error:
        column.verdict, column.why = "wrong", str(error)
    except NeftError as error:
        column.verdict, column.why = "refused", sentence(error)
        column.left.setdefault(column.why, [1, error.tensor or str(error)[:200]])
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = (
            ""
            if place is None
            else f" ({place.tb_frame.f_code.co_filename.rpartition('/')[2]}:{place.tb_lineno})"
        )
        column.verdict = "wrong"
        column.why = f"crash: {type(error).__name__}: {error}".strip().splitlines()[0][:240] + where
