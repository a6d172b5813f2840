"""A repository of the Hugging Face Hub at a revision: ``org/name@revision``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeGuard

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)
#: What git allows in no name of a branch: `git check-ref-format`.
_REFUSED = re.compile(r"\.\.|//|/\.|\.lock(/|$)|[./]$")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of the Hub, at a revision."""

    repo: str  # org/name
    revision: str | None = None  # a branch, a tag or a commit; None for the main branch

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """``org/name`` or ``org/name@revision``; None if ``text`` is neither."""
        repo, at, revision = text.partition("@")
        return cls(repo, revision or None) if is_repo(repo) and (not at or is_revision(revision)) else None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_repo(text: object) -> TypeGuard[str]:
    """Whether ``text`` is ``org/name``."""
    return isinstance(text, str) and _REPO.fullmatch(text) is not None


def is_revision(text: object) -> TypeGuard[str]:
    """Whether ``text`` can name a branch, a tag or a commit."""
    return isinstance(text, str) and bool(_REVISION.fullmatch(text)) and not _REFUSED.search(text)
