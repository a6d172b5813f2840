"""From what a user names to a local path: a file, a folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .hub_client import fetch_file, fetch_model

__all__ = ["Source", "is_hub_id", "resolve", "resolve_file"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """Where bytes come from.

    Attributes
    ----------
    path:
        The local file or folder.
    named:
        As the user named it.
    repo, revision:
        For a Hub model its id and the commit that was resolved; otherwise ``None``.
    """

    path: Path
    named: str
    repo: str | None = None
    revision: str | None = None

    @property
    def local_name(self) -> str:
        """The last part of the name: what a person calls it."""
        return Path(os.path.abspath(self.path)).name if self.repo is None else self.repo


def resolve(named: str | os.PathLike[str]) -> Source:
    """Find what ``named`` means. An existing local path beats a Hub id.

    A Hub id (``org/name`` or ``org/name@revision``) is fetched into huggingface_hub's cache, or
    found there.

    Raises
    ------
    UsageError
        If there is no such path, and no such repository or revision.
    MachineError
        If the Hub refuses (401, 403, gated) or cannot be reached.
    """
    text = os.fspath(named)
    path = Path(text)
    if text and _is_there(path):
        if not path.exists():
            raise UsageError("this is a link that leads nowhere", file=text)
        if not (path.is_file() or path.is_dir()):
            raise UsageError("this is a device, pipe or socket, not a file or folder", file=text)
        return Source(path, text)
    if is_hub_id(named):
        folder = fetch_model(text)
        return Source(folder, text, text.partition("@")[0], folder.name)
    raise UsageError(
        "there is no such file or folder" + (", and it is not a Hub id" if text.count("/") == 1 else ""),
        file=text,
        hint="name a .safetensors file, a folder of shards with their index, or org/name of the Hub",
    )


def resolve_file(named: str | os.PathLike[str], filename: str) -> Source:
    """As `resolve`, where one file is wanted: of a Hub repository, ``filename`` and nothing else is fetched.

    Whether a local path is a file, and there at all, is for whoever opens it to say. A name that ends in
    ``.safetensors`` is always a path.

    Raises
    ------
    UsageError, MachineError
        As `resolve`, for a Hub id.
    MismatchError
        If the Hub repository has no such file.
    """
    text = os.fspath(named)
    if text.endswith(".safetensors") or not is_hub_id(named):
        return Source(Path(text), text)
    file = fetch_file(text, filename)
    return Source(file, text, text.partition("@")[0], file.parent.name)


def is_hub_id(named: str | os.PathLike[str]) -> bool:
    """Whether `resolve` would ask the Hub for ``named``."""
    path = Path(named)
    return (
        isinstance(named, str)
        and _HUB_ID.fullmatch(named) is not None
        and not _is_there(path)
        and not path.parent.is_file()
        and not (path.parent.is_dir() and named.endswith(".safetensors"))
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
