"""The JSON document that scores, selections and patches carry in a safetensors header.

Each of these files is a safetensors file whose ``__metadata__`` has one key. Its value is a JSON object
with a ``version`` and the ``tensors`` that it describes. This module reads and checks what they share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import CorruptFileError
from .header import loads
from .reader import TensorFile

__all__ = ["Document", "bad", "dump", "read_document"]

Document = Mapping[str, Any]


def dump(key: str, content: Document) -> dict[str, str]:
    """The ``__metadata__`` that holds ``content`` under ``key``."""
    return {key: json.dumps(content, separators=(",", ":"), allow_nan=False)}


def read_document(file: TensorFile, key: str, what: str, version: int) -> dict[str, Any]:
    """The JSON object under ``key``; ``what`` names the kind of file in messages.

    Raises
    ------
    CorruptFileError
        If there is none, it is damaged, or its version is above ``version``.
    """
    text = file.header.metadata.get(key)
    if text is None:
        raise CorruptFileError(f"not a {what}: its header has no {key!r}", file=file.path)
    try:
        content = loads(text)
    except (ValueError, RecursionError) as error:
        raise bad(file, what, f"{key!r} is not valid JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise bad(file, what, f"{key!r} is not an object with tensors")
    found = content.get("version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise bad(file, what, "it has no version number")
    if found > version:
        raise CorruptFileError(
            f"the {what} has a newer version",
            file=file.path,
            expected=f"{version} or older",
            found=found,
            hint="update neftsurgery: pip install -U neftsurgery",
        )
    return content


def bad(file: TensorFile, what: str, why: str, tensor: str | None = None) -> CorruptFileError:
    """The error for a damaged ``what``."""
    return CorruptFileError(f"a damaged {what}: {why}", file=file.path, tensor=tensor)
