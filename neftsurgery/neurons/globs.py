"""Tensor names by pattern: ``fnmatch`` on the whole name, case-sensitive."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable

from ..errors import UsageError

__all__ = ["matching"]

_MAGIC = re.compile(r"[*?\[]")


def matching(globs: Iterable[str], names: Collection[str], *, option: str | None = None) -> set[str]:
    """The ``names`` that any of ``globs`` matches.

    Parameters
    ----------
    globs:
        Patterns, or plain names, of which each costs one lookup. A single one may be a string.
    names:
        All names; membership in it should be fast.
    option:
        If given, every glob must match something; the error names this option, such as ``include``.

    Raises
    ------
    UsageError
        If ``option`` is given and a glob matches no name.
    """
    found: set[str] = set()
    for glob in (globs,) if isinstance(globs, str) else globs:
        if _MAGIC.search(glob) is None:
            matched = {glob} if glob in names else set()
        else:
            match = re.compile(fnmatch.translate(glob)).match
            matched = {name for name in names if match(name)}
        if option is not None and not matched:
            raise UsageError(
                f"no tensor matches [[{option}]] {glob!r}",
                hint="patterns match whole tensor names: try '*' at the start, and see `neftsurgery inspect`",
            )
        found |= matched
    return found
