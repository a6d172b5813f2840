"""Errors of huggingface_hub, in our own words and without secrets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neftsurgery.errors import MachineError, MismatchError, NeftError, UsageError
from neftsurgery.sources.resolve import resolve, resolve_file

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
SECRETS = f"Authorization: Bearer {TOKEN} https://cdn.example.com/x?X-Amz-Signature=c0ffee&token={TOKEN}"


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="https://x"))


class ReadError(Exception):
    """Like the errors of the HTTP client, not an OSError."""


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
        MismatchError,
        "has no file x.safetensors",
    ),
    "429": (lambda: HfHubHTTPError(SECRETS, response=answer(429)), MachineError, "too many requests"),
    "409": (lambda: HfHubHTTPError(SECRETS, response=answer(409)), MachineError, "HTTP 409"),
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
