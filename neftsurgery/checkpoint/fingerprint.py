"""A checkpoint's fingerprint: tells two checkpoints apart in the time it takes to read their headers."""

from __future__ import annotations

import json

import xxhash

from ..tensors.reader import WeightReader

__all__ = ["EDGE_BYTES", "HASH_PREFIX", "fingerprint"]

EDGE_BYTES = 4096
HASH_PREFIX = "xxh3-128:"


def fingerprint(weights: WeightReader) -> str:
    """XXH3-128 over every tensor, by name: name, dtype, shape, first and last 4096 bytes.

    Per tensor, in code-point order of names, the hash takes in the JSON text
    ``[name, dtype, [shape]]`` (ASCII, no spaces), a newline, the first ``min(4096, n)`` and the
    last ``min(4096, n)`` of its ``n`` bytes. Shards and metadata do not count.
    """
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(2 * EDGE_BYTES))
    for name in sorted(weights.tensors):
        info = weights.tensors[name]
        state.update(json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
        edge = min(EDGE_BYTES, info.nbytes)
        if info.nbytes <= len(buffer):
            view = buffer[: info.nbytes]
            weights.read_into(name, 0, view)
        else:
            view = buffer
            weights.read_into(name, 0, view[:edge])
            weights.read_into(name, info.nbytes - edge, view[edge:])
        state.update(view[:edge])
        state.update(view[len(view) - edge :])
    return HASH_PREFIX + state.hexdigest()
