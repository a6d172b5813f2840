"""Hashes of vectors: XXH3-128, canonical big-endian."""

from __future__ import annotations

import re
from typing import TypeGuard

import numpy as np
import xxhash

from ..checkpoint.provenance import HASH_PREFIX
from ..tensors.arrays import RawBytes

#: What stands for a hash until it is known.
NO_HASH = HASH_PREFIX + "0" * 32
_HASH = re.compile(HASH_PREFIX + "[0-9a-f]{32}")


def is_hash(value: object) -> TypeGuard[str]:
    """Whether a value of a manifest is a hash as text."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def digests(vectors: RawBytes) -> RawBytes:
    """The digest of each row of raw bytes, uint8 ``[k, 16]``."""
    rows = np.ascontiguousarray(vectors)
    joined = b"".join(map(xxhash.xxh3_128_digest, rows))
    return np.frombuffer(joined, np.uint8).reshape(len(rows), 16)


class DigestHash:
    """The hash of a tensor's digests in index order, fed block by block."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, block: RawBytes) -> None:
        """Take in the next digests, uint8 ``[k, 16]``."""
        self._state.update(np.ascontiguousarray(block).data)

    def text(self) -> str:
        """As the manifest writes it."""
        return HASH_PREFIX + self._state.hexdigest()
