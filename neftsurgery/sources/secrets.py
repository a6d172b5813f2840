"""What must never be printed: access tokens, and the signatures of addresses."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

__all__ = ["Redacting", "redacted"]

_SHAPES = re.compile(r"hf_[A-Za-z0-9]{16,}|(?i:bearer)\s+\S+|(?<=[\w/])\?[^\s'\"<>]+=[^\s'\"<>]*")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
#: Shorter ones are no tokens, and would blot out text.
_SHORTEST = 8


def redacted(text: str) -> str:
    """``text`` without tokens and without the query strings of addresses, which may be signatures."""
    for token in _tokens():
        text = text.replace(token, "…")
    return _SHAPES.sub("…", text)


def _tokens() -> Iterator[str]:
    """The tokens of this process: those in its environment, and the one huggingface_hub has found."""
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if (client := sys.modules.get("huggingface_hub")) is not None:
        with suppress(Exception):  # a token file that cannot be read holds nothing that could have been sent
            found.add(client.get_token() or "")
    yield from sorted((token for token in found if len(token) >= _SHORTEST), key=len, reverse=True)


class Redacting(logging.Filter):
    """Takes secrets out of log records: huggingface_hub's name addresses, and some of these are signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite ``record``; every record passes."""
        record.msg, record.args = redacted(record.getMessage()), ()
        return True
