"""A checkpoint's fingerprint: tells two checkpoints apart in the time it takes to read their headers."""

from __future__ import annotations

import json

import xxhash

from .checkpoint import Checkpoint

__all__ = ["EDGE_BYTES", "HASH_PREFIX", "fingerprint"]

EDGE_BYTES = 4096
HASH_PREFIX = "xxh3-128:"


def fingerprint(checkpoint: Checkpoint) -> str:
    """XXH3-128 over every tensor, by name: name, dtype, shape, first and last 4096 bytes.

    Per tensor, in code-point order of names, the hash takes in the JSON text
    ``[name, dtype, [shape]]`` (ASCII, no spaces), a newline, the first ``min(4096, n)`` and the
    last ``min(4096, n)`` of its ``n`` bytes. Shards and metadata do not count.
    """
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(2 * EDGE_BYTES))
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        state.update(json.dumps([name, info.dtype, list(info.shape)], separators=(",", ":")).encode() + b"\n")
        edge = min(EDGE_BYTES, info.nbytes)
        if info.nbytes <= len(buffer):
            view = buffer[: info.nbytes]
            checkpoint.read_into(name, 0, view)
        else:
            view = buffer
            checkpoint.read_into(name, 0, view[:edge])
            checkpoint.read_into(name, info.nbytes - edge, view[edge:])
        state.update(view[:edge])
        state.update(view[len(view) - edge :])
    return HASH_PREFIX + state.hexdigest()
