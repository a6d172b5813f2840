"""Access tokens and the signatures of addresses, which must never be printed."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

__all__ = ["Redacting", "redacted"]

_SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?i:bearer)\s+\S+|(?<=[\w/])\?[^\s'\"<>]+=[^\s'\"<>]*")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
#: A shorter value is not a token; removing it would damage other text.
_MIN_TOKEN_LENGTH = 8


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
