"""What huggingface_hub raises, as errors of this package. Access tokens and signatures are never printed."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import MachineError, MismatchError, NeftError, UsageError
from .hub_guard import guarded
from .hub_id import HubId


class AbsentFileError(MismatchError):
    """A repository has no file of the name that was asked for."""


_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|(?i:bearer)\s+\S+|(?<=://)[^\s/@'\"]+(?=@)|(?<=[\w/])\?[^\s'\"<>]+=[^\s'\"<>]*"
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
#: A shorter value is not a token; removing it would damage other text.
_MIN_TOKEN_LENGTH = 8

_LOGIN = "log in with `hf auth login`, and accept the model's terms on its page if it has any"
_TOKEN = "the token may no longer be valid: log in again with `hf auth login`"
_RIGHTS = "you are logged in, but not allowed to do this: check the token's permissions and your role there"
_TERMS = "accept the model's terms on its page, as the user whose token is used"
_LATER = "the fault is on the Hub's side: try again later"
_LOOK = "look at the new commit, and run the command again"
_WAIT = "wait a few minutes; logged-in users have a higher limit"
_ENDPOINT = "check HF_ENDPOINT, and whether a proxy answers in place of the Hub"
_AGAIN = "check the network, and run the command again"

#: By HTTP status, where that says it all: the class, what went wrong, and what to do.
_ANSWERS: dict[int, tuple[type[NeftError], str, str]] = {
    404: (UsageError, "the Hub has nothing at this address", "check the name, the revision and HF_ENDPOINT"),
    409: (MachineError, "another change to the repository is in progress", "run the command again"),
    412: (MismatchError, "the repository has a newer commit than the one that was checked", _LOOK),
    429: (MachineError, "too many requests to the Hub", _WAIT),
}


@contextmanager
def hub_errors(hub_id: HubId, filename: str = "a file", *, doing: str = "fetching from") -> Iterator[None]:
    """Check answers of the Hub, and turn errors of huggingface_hub into those of this package.

    Messages begin with ``doing``.
    """
    try:
        with guarded():
            yield
    except Exception as raised:
        # One that only says what the client was doing: which file it sent, or fetched again.
        wraps = type(raised) in (RuntimeError, ValueError) and isinstance(raised.__cause__, Exception)
        error: Any = raised.__cause__ if wraps else raised
        found = error if isinstance(error, NeftError) else _translated(error, hub_id, filename, doing)
        found.file = found.file or str(hub_id)
        raise found from (found.__cause__ if found is error else raised)


def _translated(error: Exception, hub_id: HubId, filename: str, doing: str) -> NeftError:
    from huggingface_hub import errors as theirs

    status = _status(error)
    if isinstance(error, theirs.GatedRepoError):
        return _refused("access to the repository is gated", status, logged_in=_TERMS)
    if isinstance(error, theirs.RevisionNotFoundError):
        what = f"the Hub repository has no revision {hub_id.revision or 'main'!r}"
        return UsageError(what, file=hub_id.repo)
    if isinstance(error, theirs.RepositoryNotFoundError):
        if status in (401, 403):
            return _refused("the repository does not exist, or it is private", status)
        what = "there is no such local path, and no such model on the Hub"
        return UsageError(what, hint="check the spelling")
    if isinstance(error, theirs.LocalEntryNotFoundError):
        return _not_in_cache(error.__cause__)
    if isinstance(error, theirs.EntryNotFoundError):
        hint = "patches come after the base; of an adapter: `neftsurgery extract BASE ADAPTER --changed`"
        return AbsentFileError(f"the Hub repository has no file {filename}", hint=hint)
    if isinstance(error, theirs.HfHubHTTPError):
        return _answered(error, status)
    if isinstance(error, theirs.OfflineModeIsEnabled):
        return MachineError("offline mode is on", hint="unset HF_HUB_OFFLINE")
    if isinstance(error, theirs.HFValidationError):
        return UsageError(f"not a valid Hub id: {_first_line(error)}")
    if isinstance(error, OSError):
        return MachineError(f"{doing} the Hub failed: {_first_line(error)}")
    if type(error) is ValueError:  # of what the client was asked to do
        return MismatchError(f"huggingface_hub cannot do this here: {_first_line(error)}")
    if isinstance(error, (ValueError, TypeError, LookupError, AttributeError, AssertionError)):
        return _not_a_hub(error)
    # A dropped connection is an error of the HTTP client and not an OSError; which client it is depends on
    # the version of huggingface_hub. Its text may contain a signed address, so it is not shown.
    return MachineError(f"{doing} the Hub failed: {type(error).__name__}", hint=_AGAIN)


def _not_in_cache(cause: BaseException | None) -> NeftError:
    """Where the client finds a file neither on the Hub nor in the cache; the cause says why."""
    from huggingface_hub.errors import FileMetadataError

    if (status := _status(cause)) is not None:
        return _answered(cause, status)
    if isinstance(cause, FileMetadataError):
        return _not_a_hub(cause)
    return MachineError(
        "there is no such local path, the Hub cannot be reached, and the cache has no such model",
        hint="check the network (and HF_HUB_OFFLINE), or name a local file or folder",
    )


def _answered(error: Any, status: int | None) -> NeftError:
    """For an answer of the Hub that is known by its HTTP status alone."""
    if status == 400:
        said = _first_line(getattr(error, "server_message", None) or "no reason given")
        return MismatchError(f"the Hub refused the request (HTTP 400): {said}")
    if status == 409:
        creating = str(error.response.request.url).endswith("/api/repos/create")
        if creating or error.response.headers.get("X-Error-Code") == "RepoExists":
            what = "the repository exists already (HTTP 409), and the Hub does not show it to you"
            return UsageError(what, hint="choose another name, or ask its owner for access")
    if status not in _ANSWERS:
        return _refused("the Hub refused the request", status)
    kind, what, hint = _ANSWERS[status]
    return kind(f"{what} (HTTP {status})", hint=hint)


def _refused(what: str, status: int | None, *, logged_in: str = _RIGHTS) -> NeftError:
    from huggingface_hub import get_token

    if status not in (None, 401, 403):
        hint = _LATER if status is not None and status >= 500 else None
    elif get_token() is None:
        hint = _LOGIN
    else:
        hint = _TOKEN if status == 401 and logged_in is _RIGHTS else logged_in
    return MachineError(what + (f" (HTTP {status})" if status else ""), hint=hint)


def _not_a_hub(error: Exception) -> NeftError:
    what = f"the answer is not a Hub's ({type(error).__name__}: {_first_line(error)})"
    return MachineError(what, hint=_ENDPOINT)


def _status(error: object) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _first_line(said: object) -> str:
    """The first line of an error's text, without secrets and control characters."""
    line = next(iter(str(said).strip().splitlines()), "") or type(said).__name__
    return "".join(one if one.isprintable() else "?" for one in redacted(line)[:200])


def redacted(text: str) -> str:
    """``text`` without tokens, and without the query strings of addresses, which may be signatures."""
    for token in _tokens():
        text = text.replace(token, "…")
    return _SECRET.sub("…", text)


def _tokens() -> Iterator[str]:
    """The tokens of this process, longest first: from the environment, and the one huggingface_hub uses."""
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if (client := sys.modules.get("huggingface_hub")) is not None:
        with suppress(Exception):  # a token file that cannot be read was not used either
            found.add(client.get_token() or "")
    yield from sorted((token for token in found if len(token) >= _MIN_TOKEN_LENGTH), key=len, reverse=True)


class Redacting(logging.Filter):
    """Removes secrets from log records: those of huggingface_hub contain addresses, some of them signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Remove the secrets of ``record``, and let it pass."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
