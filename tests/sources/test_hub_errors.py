"""Errors of huggingface_hub, in our own words and without secrets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neftsurgery.errors import CorruptFileError, MachineError, MismatchError, NeftError, UsageError
from neftsurgery.sources.hub_errors import AbsentFileError
from neftsurgery.sources.resolve import resolve, resolve_file

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
SECRETS = f"Authorization: Bearer {TOKEN} https://cdn.example.com/x?X-Amz-Signature=c0ffee&token={TOKEN}"


def answer(status: int, headers: dict[str, str] | None = None, url: str = "https://x") -> Any:
    return SimpleNamespace(status_code=status, headers=headers or {}, request=SimpleNamespace(url=url))


def no_json() -> Exception:
    try:
        return AssertionError(json.loads("<html>"))
    except json.JSONDecodeError as error:
        return error


def forced() -> Exception:
    error = ValueError("Force download failed due to the above error.")
    error.__cause__ = ReadError(SECRETS)
    return error


def no_hub() -> Exception:
    error = LocalEntryNotFoundError("not cached")
    error.__cause__ = FileMetadataError(f"The header is missing {SECRETS}")
    return error


def ours() -> Exception:
    error = RuntimeError("Error while uploading")
    error.__cause__ = CorruptFileError("too long")
    return error


class ReadError(HTTPError):
    """As those of the HTTP client, which are not OSErrors."""


FAILURES: dict[str, tuple[Callable[[], Exception], type[NeftError], str]] = {
    "404": (
        lambda: RepositoryNotFoundError(f"404 {SECRETS}\nTraceback", response=answer(404)),
        UsageError,
        "no such model on the Hub",
    ),
    "401": (
        lambda: RepositoryNotFoundError(f"401 {SECRETS}\nTraceback", response=answer(401)),
        MachineError,
        "HTTP 401",
    ),
    "gated, 403": (
        lambda: GatedRepoError(f"{SECRETS}\nTraceback", response=answer(403)),
        MachineError,
        "gated",
    ),
    "gated, 401": (
        lambda: GatedRepoError(f"{SECRETS}\nTraceback", response=answer(401)),
        MachineError,
        "gated",
    ),
    "no revision": (
        lambda: RevisionNotFoundError(f"{SECRETS}\nTraceback", response=answer(404)),
        UsageError,
        "no revision 'main'",
    ),
    "500": (lambda: HfHubHTTPError(f"{SECRETS}\nTraceback", response=answer(500)), MachineError, "HTTP 500"),
    "403": (lambda: HfHubHTTPError(f"{SECRETS}\nTraceback", response=answer(403)), MachineError, "HTTP 403"),
    "not cached": (
        lambda: LocalEntryNotFoundError(f"{SECRETS}\nTraceback"),
        MachineError,
        "cannot be reached",
    ),
    "disk full": (lambda: OSError(28, "No space left on device"), MachineError, "No space left on device"),
    "other": (lambda: OSError(f"broken {SECRETS}\nTraceback"), MachineError, "broken"),
    "no text": (ConnectionResetError, MachineError, "ConnectionResetError"),
    "connection lost": (lambda: ReadError(f"{SECRETS}\nTraceback"), MachineError, "ReadError"),
    "not for the client": (
        lambda: ValueError(f"`parent_commit` is not a valid commit OID. {SECRETS}\nTraceback"),
        MismatchError,
        "huggingface_hub cannot do this here: `parent_commit` is not a valid commit OID",
    ),
    "an answer that is no JSON": (lambda: no_json(), MachineError, "not a Hub's .JSONDecodeError"),
    "an answer without a field": (lambda: KeyError("id"), MachineError, "HF_ENDPOINT"),
    "behind a ValueError": (lambda: forced(), MachineError, "ReadError"),
    "bad id": (lambda: HFValidationError(f"Repo id {SECRETS}\nTraceback"), UsageError, "not a valid Hub id"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_in_our_own_words(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, kind, words = FAILURES[name]

    def fail(repo: str, **options: object) -> str:
        raise make()

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words) as error:
        resolve("org/name@main")
    assert type(error.value) is kind
    text = str(error.value)
    assert "org/name" in text
    assert TOKEN not in text
    assert "c0ffee" not in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 2
    assert capfd.readouterr() == ("", "")


def test_interrupts_pass(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(repo: str, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name")


FILE_FAILURES: dict[str, tuple[Callable[[], Exception], type[NeftError], str]] = {
    **{name: case for name, case in FAILURES.items() if name != "not cached"},
    "no such file": (
        lambda: RemoteEntryNotFoundError(f"{SECRETS}\nTraceback", response=answer(404)),
        AbsentFileError,
        "has no file x.safetensors",
    ),
    "429": (lambda: HfHubHTTPError(SECRETS, response=answer(429)), MachineError, "too many requests"),
    "409": (lambda: HfHubHTTPError(SECRETS, response=answer(409)), MachineError, "run the command again"),
    "409, there": (
        lambda: HfHubHTTPError(SECRETS, response=answer(409, {"X-Error-Code": "RepoExists"})),
        UsageError,
        "exists already",
    ),
    "409, creating": (
        lambda: HfHubHTTPError(SECRETS, response=answer(409, url="https://hub/api/repos/create")),
        UsageError,
        "exists already",
    ),
    "404 that says no more": (
        lambda: HfHubHTTPError(SECRETS, response=answer(404)),
        UsageError,
        "nothing at this address",
    ),
    "404 behind the cache": (lambda: behind(answer(404)), UsageError, "nothing at this address"),
    "418": (lambda: HfHubHTTPError(SECRETS, response=answer(418)), MachineError, r"\(HTTP 418\)$"),
    "no Hub": (lambda: no_hub(), MachineError, "not a Hub's"),
    "ours, behind the client's": (lambda: ours(), CorruptFileError, "org/name@main: too long"),
    "412": (lambda: HfHubHTTPError(SECRETS, response=answer(412)), MismatchError, "newer commit"),
    "503 behind the cache": (lambda: behind(answer(503)), MachineError, "HTTP 503"),
    "behind the upload": (lambda: wrapped(answer(403)), MachineError, "HTTP 403"),
}


def behind(response: Any) -> Exception:
    error = LocalEntryNotFoundError("not cached")
    error.__cause__ = HfHubHTTPError(SECRETS, response=response)
    return error


def wrapped(response: Any) -> Exception:
    error = RuntimeError(f"Error while uploading {SECRETS}")
    error.__cause__ = HfHubHTTPError(SECRETS, response=response)
    return error


@pytest.mark.parametrize("name", FILE_FAILURES)
def test_failures_of_one_file_in_our_own_words(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    make, kind, words = FILE_FAILURES[name]

    def fail(repo: str, filename: str, **options: object) -> str:
        raise make()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(kind, match=words) as error:
        resolve_file("org/name@main", "x.safetensors")
    assert type(error.value) is kind
    text = str(error.value)
    assert "org/name" in text
    assert TOKEN not in text
    assert "c0ffee" not in text
    assert len(text.splitlines()) <= 2
    assert capfd.readouterr() == ("", "")


LOGIN, TERMS, RIGHTS = "hf auth login", "accept the model's terms", "you are logged in, but not allowed"
ADVICE = [
    # what is raised, whether there is a token, what to do, and what not
    (lambda: HfHubHTTPError("", response=answer(403)), True, [RIGHTS], [LOGIN, TERMS]),
    (lambda: HfHubHTTPError("", response=answer(403)), False, [LOGIN], [RIGHTS]),
    (
        lambda: HfHubHTTPError("", response=answer(401)),
        True,
        [LOGIN, "no longer be"],
        [TERMS, RIGHTS],
    ),
    (lambda: HfHubHTTPError("", response=answer(401)), False, [LOGIN], [RIGHTS]),
    (lambda: HfHubHTTPError("", response=answer(404)), True, ["HF_ENDPOINT"], [LOGIN, TERMS]),
    (lambda: HfHubHTTPError("", response=answer(404)), False, ["HF_ENDPOINT"], [LOGIN, TERMS]),
    (lambda: HfHubHTTPError("", response=answer(418)), True, [], [LOGIN, TERMS]),
    (lambda: GatedRepoError("", response=answer(403)), True, [TERMS], [LOGIN]),
    (lambda: GatedRepoError("", response=answer(401)), False, [LOGIN, TERMS], [RIGHTS]),
]


@pytest.mark.parametrize(("make", "token", "advised", "not_advised"), ADVICE)
def test_advice_fits_those_who_are_logged_in_and_those_who_are_not(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Exception],
    token: bool,
    advised: list[str],
    not_advised: list[str],
) -> None:
    def fail(repo: str, **options: object) -> str:
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN if token else None)
    with pytest.raises(NeftError) as error:
        resolve("org/name")
    assert all(words in str(error.value) for words in advised), str(error.value)
    assert not any(words in str(error.value) for words in not_advised), str(error.value)
