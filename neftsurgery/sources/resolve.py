"""From the name that a user gives to a local path: a file, a folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..text import tilde_hint
from .hub_client import fetch_file, fetch_model
from .hub_id import HubId
from .places import is_url, shown_url
from .remote import RemoteFolder

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_INDEX = re.compile(r"([^/]+\.safetensors)\.index(\.[\w-]+)?\.json")


@dataclass(frozen=True, slots=True)
class Source:
    """Where bytes come from."""

    path: Path  # local
    named: str  # as the user named it
    repo: str | None = None  # org/name of a Hub model
    revision: str | None = None  # the commit that the name of a Hub model stood for
    index: str | None = None  # the index in the folder that was named, if its readers take other files
    remote: RemoteFolder | None = None  # the files behind a URL, for which those at `path` stand in

    @property
    def local_name(self) -> str:
        """The name a person would use: the last part of a local path, or ``org/name`` of a Hub model."""
        return Path(os.path.abspath(self.path)).name if self.repo is None else self.repo

    @property
    def address(self) -> str:
        """What `resolve` finds the same files by, in any folder and on any machine that sees them."""
        return os.path.abspath(self.path / (self.index or "")) if self.remote is None else self.remote.url


def resolve(named: str | os.PathLike[str]) -> Source:
    """Find what ``named`` refers to: an existing local path, or else a Hub id (``org/name[@revision]``).

    The index of a folder's shards stands for the folder, that of a variant (``.index.fp16.json``) for its
    shards alone. The model of a Hub id is fetched into huggingface_hub's cache. Raises a `UsageError` if
    there is no such path; else as `fetch_model`.
    """
    text = os.fspath(named)
    if is_url(text):
        return _behind_url(text)
    path = Path(text)
    if text and _exists(path):
        if not path.exists():
            annexed = ".git/annex/objects/" in os.readlink(path)
            raise UsageError(
                "the symlink is broken: its target does not exist",
                file=text,
                hint="fetch the content: `git annex get`" if annexed else None,
            )
        if not (path.is_file() or path.is_dir()):
            raise UsageError("expected a file or folder, found a device, pipe or socket", file=text)
        found = _INDEX.fullmatch(path.name)
        if not found or path.is_dir():
            return Source(path, text)
        if not found[2] and (path.parent / found[1]).is_file():
            raise UsageError(
                f"readers take the {found[1]} beside this index", file=text, hint="name that file"
            )
        return Source(path.parent, text, index=None if path.name == INDEX_NAME else path.name)
    if (hub_id := _hub_id(named)) is not None:
        folder = fetch_model(hub_id)
        return Source(folder, text, hub_id.repo, folder.name)
    raise UsageError(
        "there is no such file or folder" + (", and it is not a Hub id" if text.count("/") == 1 else ""),
        file=text,
        hint=tilde_hint(text)
        or "name a .safetensors file, a folder of shards with their index, or org/name on the Hub",
    )


def resolve_file(named: str | os.PathLike[str], filename: str) -> Source:
    """As `resolve`, for one file: only ``filename`` is fetched from a Hub repository. Raises as `fetch_file`.

    A local path is not checked: opening it will. A name that ends in ``.safetensors`` is always a path.
    """
    text = os.fspath(named)
    if is_url(text):
        hint = "fetch the file, and name it; a patch on the Hub is named org/name"
        raise UsageError("only checkpoints are read behind URLs", file=shown_url(text), hint=hint)
    hub_id = None if text.endswith(".safetensors") else _hub_id(named)
    if hub_id is None:
        return Source(Path(text), text)
    file = fetch_file(hub_id, filename)
    return Source(file, text, hub_id.repo, file.parent.name)


def _behind_url(url: str) -> Source:
    """As `resolve`, for the checkpoint behind a URL; raises as `RemoteFolder`."""
    remote = RemoteFolder(url)
    place, single = remote.place, remote.place.single or ""
    named = f"{place.shown}/{single}".rstrip("/")
    found = resolve(remote.root / single)  # an index stands for its folder
    return replace(found, named=named, repo=place.repo, revision=place.revision, remote=remote)


def is_index(name: str) -> bool:
    """Whether a file of this name, or path, is an index of shards, as ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(name.rpartition("/")[2]) is not None


def is_hub_id(named: str | os.PathLike[str]) -> bool:
    """Whether `resolve` would ask the Hub for ``named``."""
    return _hub_id(named) is not None


def _hub_id(named: str | os.PathLike[str]) -> HubId | None:
    hub_id = HubId.parse(named) if isinstance(named, str) else None
    path = Path(named)
    if hub_id is None or _exists(path) or path.parent.is_file():
        return None
    return None if path.parent.is_dir() and path.suffix == ".safetensors" else hub_id


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
