"""Tokens and signatures are never printed."""

from __future__ import annotations

import logging

import huggingface_hub
import pytest

from neftsurgery.sources.hub_client import client
from neftsurgery.sources.hub_errors import redacted

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        f"authorization: Bearer {TOKEN}",
        f"BEARER {TOKEN}, and more",
        f"{{'Authorization': 'Bearer {TOKEN}'}}",
        f"https://user:{TOKEN}@hub/x",
        f"GET https://cdn/x?X-Amz-Signature={TOKEN}&Expires=3 failed",
    ],
)
def test_tokens_by_their_looks(text: str) -> None:
    assert TOKEN not in redacted(text)
    assert TOKEN[3:] not in redacted(text)


def test_signed_addresses() -> None:
    text = "GET https://cdn.example/a/b?X-Amz-Signature=c0ffee&Expires=3, then https://hub/api?x=1"
    assert redacted(text) == "GET https://cdn.example/a/b… then https://hub/api…"


@pytest.mark.parametrize(
    "text", ["is it there? yes = no", "hf_hub_download", "File x.py, line 3: a = b if c else d", "what?", ""]
)
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_tokens_that_look_like_words(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, " correct horse battery \n")
    assert redacted("it was: correct horse battery!") == "it was: …!"
    monkeypatch.setenv(variable, "short")
    assert redacted("a short text") == "a short text"


def test_the_token_that_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "stored-in-a-file")
    assert redacted("Bearer? stored-in-a-file") == "Bearer? …"


def test_the_log_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    """huggingface_hub logs the address of a retry, which may be signed."""
    client()
    client()
    logger = logging.getLogger("huggingface_hub")
    assert logger.handlers
    for handler in logger.handlers:
        assert len(handler.filters) == 1
        record = logger.makeRecord(
            "x", logging.WARNING, "f", 1, "'%s' requesting %s", (TOKEN, "http://h/p?s=1"), None
        )
        assert handler.filter(record)
        assert record.getMessage() == "'…' requesting http://h/p…"
