"""Bytes compressed by zstd. What a frame says of its size is checked before any room is made for it."""

from __future__ import annotations

import zstandard


def compress(content: bytes, level: int) -> bytes:
    """One zstd frame, which says the size of its content."""
    return zstandard.ZstdCompressor(level=level).compress(content)


def content_size(packed: bytes) -> int:
    """How many bytes a frame says it holds. Raises a ``ValueError`` if it does not say so."""
    try:
        found = int(zstandard.frame_content_size(packed))
    except zstandard.ZstdError:
        found = -1
    if found < 0:
        raise ValueError("it is not what zstd wrote")
    return found


def decompress(packed: bytes, size: int) -> bytes:
    """The ``size`` bytes in a frame. Raises a ``ValueError`` if it is damaged, or holds more or fewer."""
    if content_size(packed) != size:
        raise ValueError("it has another length")
    try:
        # The limit given to zstd does not count where the frame says a size: hence the check above.
        found = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError("it is not what zstd wrote") from error
    if len(found) != size:
        raise ValueError("it has another length")
    return found
