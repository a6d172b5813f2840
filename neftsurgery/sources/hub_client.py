"""The Hugging Face Hub: fetching models and single files, and what its client's errors mean here."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import MachineError, MismatchError, NeftError, UsageError
from .secrets import Redacting, redacted

__all__ = [
    "RemoteFile",
    "client",
    "fetch_file",
    "fetch_model",
    "hub_errors",
    "is_damaged",
    "is_offline",
    "page",
    "remote_file",
]

#: Never fetched: weights in formats that are not read here. `apply` leaves such files behind as well.
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack"]
_OTHER_FOLDERS = ["original/*", "onnx/*", "openvino/*", "coreml/*"]

_LOGIN = "log in with `hf auth login`, and accept the model's terms on its page if it has any"
_LATER = "that is a fault on the Hub's side: try again later"
_AGAIN = "check the network, and run the command again"
_READ_BYTES = 1 << 20


def client() -> ModuleType:
    """The package huggingface_hub, whose log no longer shows tokens or signed addresses."""
    import huggingface_hub

    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(one, Redacting) for one in handler.filters):
            handler.addFilter(Redacting())
    return huggingface_hub


def page(repo: str) -> str:
    """The address of a repository's page."""
    return f"{client().HfApi().endpoint}/{repo}"


def is_offline() -> bool:
    """Whether the user has switched the Hub off: only the cache is to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_model(named: str) -> Path:
    """The folder of a Hub model's files in huggingface_hub's cache, named like its commit.

    Raises
    ------
    UsageError
        If there is no such repository or revision.
    MachineError
        If the Hub refuses (401, 403, gated) or cannot be reached.
    """
    repo, _, revision = named.partition("@")
    with hub_errors(named):
        folder = client().snapshot_download(
            repo, revision=revision or None, ignore_patterns=[*_OTHER_WEIGHTS, *_OTHER_FOLDERS]
        )
    return Path(folder)


def fetch_file(named: str, filename: str, *, again: bool = False) -> Path:
    """One file of a Hub repository in huggingface_hub's cache; its folder is named like the commit.

    Parameters
    ----------
    again:
        Fetch it even if the cache has it.

    Raises
    ------
    UsageError, MachineError
        As `fetch_model`.
    MismatchError
        If the repository has no such file.
    """
    repo, _, revision = named.partition("@")
    with hub_errors(named, filename):
        path = client().hf_hub_download(repo, filename, revision=revision or None, force_download=again)
    return Path(path)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a Hub repository that was not fetched: the commit it is of, and its bytes."""

    commit: str | None
    nbytes: int | None


def remote_file(named: str, filename: str) -> RemoteFile:
    """Ask the Hub for a file without fetching it. Raises as `fetch_file`."""
    repo, _, revision = named.partition("@")
    with hub_errors(named, filename):
        hub = client()
        found = hub.HfApi().get_hf_file_metadata(
            url=hub.hf_hub_url(repo, filename, revision=revision or None)
        )
    return RemoteFile(found.commit_hash, found.size)


def is_damaged(path: Path) -> bool:
    """Whether a large file in the cache is not what the Hub holds: its blob is named like its SHA-256."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) is None:
        return False
    state = hashlib.sha256()
    with blob.open("rb") as file:
        while block := file.read(_READ_BYTES):
            state.update(block)
    return state.hexdigest() != blob.name


@contextmanager
def hub_errors(named: str, filename: str = "a file", *, doing: str = "fetching it from") -> Iterator[None]:
    """Turn what huggingface_hub raises about ``named`` into errors of ours, in our own text."""
    try:
        yield
    except NeftError:
        raise
    except Exception as error:
        raise _ours(_innermost(error), named, filename, doing) from error


def _innermost(error: Exception) -> Exception:
    """Uploading wraps the error of the HTTP client in a RuntimeError that says which file it was."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _ours(error: Exception, named: str, filename: str, doing: str) -> NeftError:
    client()  # so that its errors can be told apart
    from huggingface_hub import errors as theirs

    repo, _, revision = named.partition("@")
    status = _status(error)
    if isinstance(error, theirs.GatedRepoError):
        return _refused(named, "access to it is gated", status)
    if isinstance(error, theirs.RevisionNotFoundError):
        return UsageError(f"the Hub repository has no revision {revision or 'main'!r}", file=repo)
    if isinstance(error, theirs.RepositoryNotFoundError):
        if status in (401, 403):
            return _refused(named, "it is not there, or it is private", status)
        return UsageError(
            "there is no such local path, and no such model on the Hub", file=named, hint="check the spelling"
        )
    if isinstance(error, theirs.LocalEntryNotFoundError):
        return _not_at_hand(error, named, filename)
    if isinstance(error, theirs.EntryNotFoundError):
        return MismatchError(
            f"the Hub repository holds no {filename}",
            file=named,
            hint="check the name and the revision: what `neftsurgery push` writes has that file",
        )
    if isinstance(error, theirs.HfHubHTTPError):
        return _answered(error, named, status)
    if isinstance(error, theirs.OfflineModeIsEnabled):
        return MachineError("the Hub is switched off here", file=named, hint="unset HF_HUB_OFFLINE")
    if isinstance(error, theirs.HFValidationError):
        return UsageError(f"not a usable Hub id: {_one_line(error)}", file=named)
    if isinstance(error, OSError):
        return MachineError(f"{doing} the Hub failed: {_one_line(error)}", file=named)
    # A dropped connection is an error of the HTTP client, which is no OSError; which client it is
    # depends on the version of huggingface_hub. Its text may hold a signed address: not for showing.
    return MachineError(f"{doing} the Hub failed: {type(error).__name__}", file=named, hint=_AGAIN)


def _not_at_hand(error: Exception, named: str, filename: str) -> NeftError:
    """The client's last word where neither the Hub nor the cache has it: why is in the cause."""
    status = _status(error.__cause__)
    if status is not None:
        return _answered(error.__cause__, named, status)
    return MachineError(
        "there is no such local path, the Hub cannot be reached, and its cache here has no such model",
        file=named,
        hint="check the network (and HF_HUB_OFFLINE), or name a local file or folder",
    )


def _answered(error: object, named: str, status: int | None) -> NeftError:
    """For an answer of the Hub that says no more than its number."""
    if status == 409:
        return MachineError(
            "the Hub is changing the repository at this moment (HTTP 409)",
            file=named,
            hint="nothing was changed: run the command again",
        )
    if status == 412:
        return MismatchError(
            "the repository has a newer commit than the one this was made for (HTTP 412)",
            file=named,
            hint="nothing was changed: look at what is new there, and run the command again",
        )
    if status == 429:
        return MachineError(
            "the Hub asks for fewer requests (HTTP 429)",
            file=named,
            hint="wait some minutes; who is logged in may ask for more",
        )
    if status == 400:
        return MismatchError("the Hub does not accept this (HTTP 400): " + _said(error), file=named)
    return _refused(named, "the Hub refused", status)


def _refused(named: str, what: str, status: int | None) -> NeftError:
    ours = status is None or status < 500
    return MachineError(
        what + (f" (HTTP {status})" if status else ""), file=named, hint=_LOGIN if ours else _LATER
    )


def _status(error: object) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _said(error: object) -> str:
    """The server's own message, where it has one."""
    said: Any = getattr(error, "server_message", None)
    return redacted(str(said or "no reason given").splitlines()[0][:200])


def _one_line(error: Exception) -> str:
    """The first line of an error's text, without secrets."""
    return redacted(next(iter(str(error).splitlines()), "") or type(error).__name__)
