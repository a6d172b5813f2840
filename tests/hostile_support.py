"""What tests of hostile files share: edits of bytes, drawn at random, and a limit of memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hypothesis import strategies as st

Edit = tuple[float, str, bytes]  # where, as a share of the length; what; with which bytes

#: One to four edits.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "insert", "delete", "zero"]), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: Sequence[Edit]) -> bytes:
    """The content after all edits, one after the other."""
    changed = bytearray(content)
    for where, action, data in edits:
        position = int(where * (len(changed) - 1))
        if action == "flip":
            changed[position] ^= data[0] if data else 1
        elif action == "insert":
            changed[position:position] = data
        else:
            changed[position : position + len(data)] = b"" if action == "delete" else bytes(len(data))
    return bytes(changed)


@contextmanager
def frugal(limit: int = 32 << 20) -> Iterator[None]:
    """At most ``limit`` bytes at once, whatever a file claims."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
