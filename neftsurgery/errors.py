"""Every error this package raises on purpose, as one tree with typed fields.

The class says what kind of failure it is (and so, in the command line, which exit code: see
``neftsurgery.cli``); the fields say where it happened. Nothing here does I/O.

A message names an option as ``[[max_per_tensor]]`` or ``[[policy=random]]``. Whoever shows it spells the
option as its user does: a keyword in Python, a flag on the command line, a key in a recipe.
"""

from __future__ import annotations

import errno
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import ParamSpec, TypeVar

from .text import lines

P = ParamSpec("P")
T = TypeVar("T")

#: Spells an option, given its Python name and, where the message names one, its value.
Spelling = Callable[[str, str | None], str]
_OPTION = re.compile(r"\[\[([a-z]\w*)(?:=([^\]]*))?\]\]")

#: Where huggingface_hub keeps a model, which its users know as ``org/name@commit``.
_IN_CACHE = re.compile(r"^.*/models--([\w.-]+?)--([\w.-]+)/snapshots/(?=[^/])", re.DOTALL)

#: Where local files stand in for those behind a URL, whose text is the rest of the path.
_STAND_IN = re.compile(r"^.*/neft-remote-\w+/(\w+):/")


def hub_place(path: str) -> str:
    """A path as its user knows it: in huggingface_hub's cache, ``org/name@commit/file``; or a URL."""
    return _STAND_IN.sub(r"\1://", _IN_CACHE.sub(r"\1/\2@", path))


def keyword(name: str, value: str | None) -> str:
    """An option as Python spells it: ``policy``, ``policy='random'``."""
    if value is None:
        return name
    literal = value in ("True", "False", "None", "...") or value.replace(".", "", 1).isdigit()
    return f"{name}={value}" if literal else f"{name}={value!r}"


class NeftError(Exception):
    """Base of all errors of this package.

    Args:
        what: What went wrong, one clause, no full stop; options as ``[[name]]``.
        file, tensor: The file that it is about and, if it is about one tensor, its name.
        expected, found: Both sides of a comparison that failed.
        hint: What to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else hub_place(str(file))
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = hint
        self.also: Sequence[NeftError] = ()  # other errors that were found at the same time

    def __str__(self) -> str:
        return self.text(keyword)

    def text(self, spell: Spelling) -> str:
        """The message, one line and one for the hint, with options spelled by ``spell``."""
        file = self.file if self.file is None or self.file.strip() else repr(self.file)
        name = self.tensor if len(self.tensor or "") <= 200 else f"{str(self.tensor)[:199]}…"
        where = [part for part in (file, name and f"tensor {name}") if part]
        text = (", ".join(where) + ": " if where else "") + spelled(self.what, spell)
        if self.expected is not None:
            text += f" (expected {self.expected}, found {self.found})"
        elif self.found is not None:
            text += f" (found {self.found})"
        first = lines([text, spelled(self.hint, spell)] if self.hint else [text])
        return "\n".join([first, *(error.text(spell) for error in self.also)])


def spelled(text: str, spell: Spelling) -> str:
    """A message with its options spelled by ``spell``."""
    return _OPTION.sub(lambda match: spell(match[1], match[2]), text)


class UsageError(NeftError, ValueError):
    """The request is wrong: a path that is not there, an output that exists, options that clash."""


class MismatchError(NeftError):
    """Inputs that are each fine do not fit each other: another base, other shapes, mixed states."""


class CorruptFileError(NeftError):
    """A file is damaged or hostile, or its hashes do not match its content."""


class MachineError(NeftError, OSError):
    """The machine or the network failed: disk full, permission, gated, a dropped connection."""

    @classmethod
    def of(cls, error: OSError) -> MachineError:
        """The operating system's error, with its file and what to do."""
        what = (error.strerror or str(error) or type(error).__name__).lower()
        return cls(what, file=error.filename, hint=_HINTS.get(error.errno or 0))


_HINTS = {
    errno.ENOSPC: "free some space, or write the output to another disk",
    errno.EDQUOT: "free some space, or write the output to another disk",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EROFS: "the file system is mounted read-only: write the output elsewhere",
}


@contextmanager
def naming(file: str | PathLike[str] | None) -> Iterator[None]:
    """Name ``file`` in an ``OSError`` that names none, as the kernel's about a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and file is not None and not isinstance(error, NeftError):
            error.filename = str(file)
        raise


def boundary(verb: Callable[P, T]) -> Callable[P, T]:
    """Turn the ``OSError`` of a public verb into a `MachineError` that names the file.

    Inner code lets ``OSError`` pass; only the public edge translates it, once.
    """

    @functools.wraps(verb)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return verb(*args, **kwargs)
        except NeftError:
            raise
        except OSError as error:
            raise MachineError.of(error) from error

    return translated
