"""What huggingface_hub raises, as errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MachineError, MismatchError, NeftError, UsageError
from .hub_id import HubId
from .secrets import redacted

__all__ = ["hub_errors"]

_LOGIN = "log in with `hf auth login`, and accept the model's terms on its page if it has any"
_LATER = "the fault is on the Hub's side: try again later"
_AGAIN = "check the network, and run the command again"


@contextmanager
def hub_errors(hub_id: HubId, filename: str = "a file", *, doing: str = "fetching from") -> Iterator[None]:
    """Turn errors of huggingface_hub into those of this package; messages begin with ``doing``."""
    try:
        yield
    except NeftError:
        raise
    except Exception as error:
        raise _translated(_unwrapped(error), hub_id, filename, doing) from error


def _unwrapped(error: Exception) -> Exception:
    """The error of the HTTP client, which an upload wraps in a RuntimeError that names the file."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _translated(error: Exception, hub_id: HubId, filename: str, doing: str) -> NeftError:
    from huggingface_hub import errors as theirs

    named = str(hub_id)
    status = _status(error)
    if isinstance(error, theirs.GatedRepoError):
        return _refused(named, "access to the repository is gated", status)
    if isinstance(error, theirs.RevisionNotFoundError):
        return UsageError(
            f"the Hub repository has no revision {hub_id.revision or 'main'!r}", file=hub_id.repo
        )
    if isinstance(error, theirs.RepositoryNotFoundError):
        if status in (401, 403):
            return _refused(named, "the repository does not exist, or it is private", status)
        return UsageError(
            "there is no such local path, and no such model on the Hub", file=named, hint="check the spelling"
        )
    if isinstance(error, theirs.LocalEntryNotFoundError):
        return _not_in_cache(error, named)
    if isinstance(error, theirs.EntryNotFoundError):
        return MismatchError(
            f"the Hub repository has no file {filename}",
            file=named,
            hint="check the name and the revision: `neftsurgery push` writes this file",
        )
    if isinstance(error, theirs.HfHubHTTPError):
        return _answered(error, named, status)
    if isinstance(error, theirs.OfflineModeIsEnabled):
        return MachineError("offline mode is on", file=named, hint="unset HF_HUB_OFFLINE")
    if isinstance(error, theirs.HFValidationError):
        return UsageError(f"not a valid Hub id: {_first_line(error)}", file=named)
    if isinstance(error, OSError):
        return MachineError(f"{doing} the Hub failed: {_first_line(error)}", file=named)
    # A dropped connection is an error of the HTTP client and not an OSError; which client it is depends on
    # the version of huggingface_hub. Its text may contain a signed address, so it is not shown.
    return MachineError(f"{doing} the Hub failed: {type(error).__name__}", file=named, hint=_AGAIN)


def _not_in_cache(error: Exception, named: str) -> NeftError:
    """The client's error where it finds a file neither on the Hub nor in the cache; the cause says why."""
    status = _status(error.__cause__)
    if status is not None:
        return _answered(error.__cause__, named, status)
    return MachineError(
        "there is no such local path, the Hub cannot be reached, and the cache has no such model",
        file=named,
        hint="check the network (and HF_HUB_OFFLINE), or name a local file or folder",
    )


def _answered(error: object, named: str, status: int | None) -> NeftError:
    """For an answer of the Hub that is known by its HTTP status alone."""
    if status == 409:
        return MachineError(
            "another change to the repository is in progress (HTTP 409)",
            file=named,
            hint="nothing was changed: run the command again",
        )
    if status == 412:
        return MismatchError(
            "the repository has a newer commit than the one that was checked (HTTP 412)",
            file=named,
            hint="nothing was changed: look at the new commit, and run the command again",
        )
    if status == 429:
        return MachineError(
            "too many requests to the Hub (HTTP 429)",
            file=named,
            hint="wait a few minutes; logged-in users have a higher limit",
        )
    if status == 400:
        said = str(getattr(error, "server_message", None) or "no reason given").splitlines()[0]
        return MismatchError(f"the Hub refused the request (HTTP 400): {redacted(said[:200])}", file=named)
    return _refused(named, "the Hub refused the request", status)


def _refused(named: str, what: str, status: int | None) -> NeftError:
    return MachineError(
        what + (f" (HTTP {status})" if status else ""),
        file=named,
        hint=_LATER if status is not None and status >= 500 else _LOGIN,
    )


def _status(error: object) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without secrets."""
    return redacted(next(iter(str(error).splitlines()), "") or type(error).__name__)
