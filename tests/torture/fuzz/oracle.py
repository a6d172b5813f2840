"""How the safetensors package reads a file, and where our reader differs from it on purpose."""

from __future__ import annotations

import json
import struct
from typing import Any

from safetensors import SafetensorError, deserialize

from neftsurgery.tensors.header import Header

__all__ = ["agrees", "packages_view", "stricter"]


def packages_view(raw: bytes) -> dict[str, dict[str, Any]] | None:
    """The tensors as the package reads them; None if it refuses the file."""
    try:
        return dict(deserialize(raw))
    except SafetensorError:
        return None


def stricter(raw: bytes) -> bool:
    """Whether the header has what we refuse on purpose: a duplicate key, or an entry in another form."""
    strange = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal strange
        strange = strange or len(dict(pairs)) < len(pairs)
        return dict(pairs)

    length = struct.unpack("<Q", raw[:8])[0]
    content = json.loads(raw[8 : 8 + length], object_pairs_hook=look)
    content.pop("__metadata__", None)
    return strange or not all(isinstance(e, dict) and isinstance(e["dtype"], str) for e in content.values())


def agrees(header: Header, raw: bytes, theirs: dict[str, dict[str, Any]]) -> None:
    """Assert that both read the same names, types, shapes and bytes."""
    assert set(header.tensors) == set(header.offsets) == set(theirs)
    for name, info in header.tensors.items():
        assert info.name == name
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        begin = header.offsets[name]
        assert raw[begin : begin + info.nbytes] == bytes(theirs[name]["data"])
