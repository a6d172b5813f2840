"""The JSON document that scores, selections and patches carry in a safetensors header.

Each of these files is a safetensors file whose ``__metadata__`` has one key with a JSON object of a
``version`` and the ``tensors`` it speaks of. This module reads and checks what they share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import CorruptFileError
from .dtypes import DTYPES
from .header import TensorInfo, loads
from .layout import Layout
from .tensorfile import TensorFile

__all__ = ["Document", "bad", "described_tensor", "dump", "read_document"]

Document = Mapping[str, Any]

_MAX_AXES = 64
_MAX_ELEMENTS = 1 << 62


def dump(key: str, content: Document) -> dict[str, str]:
    """The ``__metadata__`` that holds ``content`` under ``key``."""
    return {key: json.dumps(content, separators=(",", ":"), allow_nan=False)}


def read_document(file: TensorFile, key: str, what: str, version: int) -> dict[str, Any]:
    """The JSON object under ``key``; ``what`` names the kind of file in messages.

    Raises
    ------
    CorruptFileError
        If there is none, it is damaged, or of a version above ``version``.
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
            f"the {what} is of a newer version",
            file=file.path,
            expected=f"{version} or older",
            found=found,
            hint="update neftsurgery: pip install -U neftsurgery",
        )
    return content


def bad(file: TensorFile, what: str, why: str, tensor: str | None = None) -> CorruptFileError:
    """The error for a damaged ``what``."""
    return CorruptFileError(f"a damaged {what}: {why}", file=file.path, tensor=tensor)


def described_tensor(file: TensorFile, what: str, name: str, entry: object) -> tuple[TensorInfo, Layout]:
    """A tensor's ``shape``, ``dtype`` and ``neuron_axes`` as an entry of ``tensors`` tells them.

    Raises
    ------
    CorruptFileError
        If one is missing or makes no sense.
    """
    if not isinstance(entry, dict):
        raise bad(file, what, "its description is not an object", name)
    shape, dtype, axes = entry.get("shape"), entry.get("dtype"), entry.get("neuron_axes")
    if not _naturals(shape) or not _naturals(axes) or not _known(dtype):
        raise bad(file, what, "its shape, dtype or neuron_axes are missing or make no sense", name)
    if len(shape) > _MAX_AXES or len(axes) > len(shape) or math.prod(shape) >= _MAX_ELEMENTS:
        raise bad(file, what, "its shape has too many axes or elements", name)
    if DTYPES[dtype].bits % 8:
        raise bad(file, what, f"{dtype} elements do not fill whole bytes", name)
    try:
        return TensorInfo(name, dtype, tuple(shape)), Layout.of(shape, axes)
    except ValueError as error:
        raise bad(file, what, str(error), name) from error


def _known(dtype: object) -> TypeGuard[str]:
    return isinstance(dtype, str) and dtype in DTYPES


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
    )
