"""One block of elements against a base, in the smallest form that gives it back to the bit."""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compression import compress, decompress
from .elements import Carrier, Elements
from .tables import Events, FrequencyTable, events

__all__ = ["BLOCK", "Form", "decode", "encode", "encode_fast"]

#: Elements of a block at most.
BLOCK = 1 << 20
_COUNT = struct.Struct("<I")
_ZSTD_LEVEL = 3
#: Coded at this share of its size or more, a block is worth a try with zstd.
_POOR = 0.6


class Form(IntEnum):
    """How a block is stored."""

    SAME = 0  # nothing: it is the base's
    CODED = 1  # differences, coded by a table
    CHANGED = 2  # positions and bits of the changed elements
    ZSTD = 3  # its bytes, compressed
    RAW = 4  # its bytes


_local = threading.local()


def _scratch(length: int, size: int) -> tuple[Events, NDArray[np.uint16], NDArray[np.uint32]]:
    """Room for the events, words and plain bits of a block, kept per thread and size of element."""
    kept: dict[Any, tuple[Events, NDArray[np.uint16], NDArray[np.uint32]]] = vars(_local)
    if size not in kept or len(kept[size][1]) < 2 * length + 96:
        extras = np.empty((size + 1) * length // 2 + 96, np.uint32)
        kept[size] = (events(length, size), np.empty(2 * length + 96, np.uint16), extras)
    return kept[size]


def encode(
    base: Carrier | None, tuned: Carrier, elements: Elements, table: FrequencyTable | None
) -> tuple[Form, bytes]:
    """The smallest form of ``tuned``; CODED only with a ``table``. Without ``base``, zeros stand for it."""
    against = np.zeros_like(tuned) if base is None else base
    if base is not None and np.array_equal(base, tuned):
        return Form.SAME, b""
    form, code, changes = Form.RAW, tuned.tobytes(), len(tuned)
    if table is not None:
        coded, changes = _coded(against, tuned, elements, table)
        if len(coded) < len(code):
            form, code = Form.CODED, coded
    if base is None or len(code) >= _POOR * tuned.nbytes:
        packed = compress(tuned.tobytes(), _ZSTD_LEVEL)
        if len(packed) < len(code):
            form, code = Form.ZSTD, packed
    if base is not None and changes * (1 + elements.size) < len(code):
        changed = _changes(base, tuned, len(code))
        if changed is not None:
            form, code = Form.CHANGED, changed
    return form, code


def encode_fast(base: Carrier | None, tuned: Carrier) -> tuple[Form, bytes]:
    """As `encode`, in forms that are decoded about as fast as memory is copied."""
    if base is not None:
        if np.array_equal(base, tuned):
            return Form.SAME, b""
        changed = _changes(base, tuned, tuned.nbytes)
        if changed is not None:
            return Form.CHANGED, changed
    return Form.RAW, tuned.tobytes()


def _coded(base: Carrier, tuned: Carrier, elements: Elements, table: FrequencyTable) -> tuple[bytes, int]:
    """The code, and how many elements it holds."""
    from .kernels import encode_changes, encode_values, find_changes, find_values

    room, words, extras = _scratch(len(tuned), elements.size)
    gap_table, value_table = table.encoding
    if table.dense:
        changes = len(tuned)
        find_values(base, tuned, elements.rules, table.contexts, room)
        w, e = encode_values(changes, room, value_table, words, extras)
    else:
        count = len(table.values)
        n = find_changes(base, tuned, elements.rules, table.contexts, count, room)
        w, e = encode_changes(n, count, room, gap_table, value_table, words, extras)
        changes = n - count
    padding = bytes(2 * (w % 2))
    return b"".join([_COUNT.pack(w), words[:w].tobytes(), padding, extras[:e].tobytes()]), changes


def _changes(base: Carrier, tuned: Carrier, most: int) -> bytes | None:
    """Positions and XORs of the changed elements, if they take less than ``most`` bytes."""
    flipped = base ^ tuned
    positions = np.flatnonzero(flipped)
    if len(positions) * (1 + flipped.itemsize) >= most:
        return None
    steps = np.diff(positions, prepend=-1) - 1
    best: bytes | None = None
    for kind in (np.dtype("u1"), np.dtype("<u2")):
        code = _stepped(steps, flipped[positions], kind)
        if len(code) < (most if best is None else len(best)):
            best = code
    return best


def _stepped(steps: NDArray[np.int64], flips: Carrier, kind: np.dtype[np.unsignedinteger]) -> bytes:
    """Steps of a width; a step that is too wide is made in several, which flip nothing."""
    limit = int(np.iinfo(kind).max)
    more = steps // (limit + 1)  # empty steps before each change
    last = np.cumsum(more + 1) - 1
    narrow = np.full(int(last[-1]) + 1 if len(last) else 0, limit, kind)
    values = np.zeros(len(narrow), flips.dtype)
    narrow[last] = steps - more * (limit + 1)
    values[last] = flips
    return b"".join([_COUNT.pack(len(narrow)), bytes([kind.itemsize]), narrow.tobytes(), values.tobytes()])


def decode(
    form: int,
    code: bytes,
    base: Carrier | None,
    out: Carrier,
    elements: Elements,
    table: FrequencyTable | None,
) -> None:
    """Fill ``out`` with the block that ``code`` stands for.

    Raises a ``ValueError`` if the code is damaged. Work and memory are bounded by the block's size.
    """
    against = np.zeros_like(out) if base is None else base
    if form == Form.SAME and base is not None and not code:
        out[:] = base
    elif form == Form.RAW and len(code) == out.nbytes:
        out[:] = np.frombuffer(code, out.dtype)
    elif form == Form.ZSTD:
        out[:] = np.frombuffer(decompress(code, out.nbytes), out.dtype)
    elif form == Form.CHANGED:
        _decode_changed(code, against, out)
    elif form == Form.CODED and table is not None:
        _decode_coded(code, against, out, elements, table)
    else:
        raise ValueError("it has an unknown form")


def _decode_changed(code: bytes, base: Carrier, out: Carrier) -> None:
    size = code[4] if len(code) > 4 else 0
    (count,) = _COUNT.unpack(code[:4]) if size in (1, 2) else (-1,)
    if count < 0 or len(code) != 5 + count * (size + out.itemsize) or count > len(out):
        raise ValueError("its changes have another length")
    middle = 5 + count * size
    positions = np.cumsum(np.frombuffer(code[5:middle], f"<u{size}"), dtype=np.int64) + np.arange(count)
    if count and int(positions[-1]) >= len(out):
        raise ValueError("its changes leave the block")
    out[:] = base
    out[positions] ^= np.frombuffer(code[middle:], out.dtype)


def _decode_coded(
    code: bytes, base: Carrier, out: Carrier, elements: Elements, table: FrequencyTable
) -> None:
    from .kernels import decode_changes, decode_values

    (count,) = _COUNT.unpack(code[:4]) if len(code) >= 4 and len(code) % 4 == 0 else (-1,)
    middle = 4 + 4 * -(-count // 2)  # the words fill whole groups of four bytes
    if count < 0 or middle > len(code) or (count % 2 and any(code[middle - 2 : middle])):
        raise ValueError("its code has another length")
    words = np.frombuffer(code[: 4 + 2 * count] + bytes(2), "<u2")[2:]
    extras = np.frombuffer(code[middle:] + bytes(4), "<u4")
    gaps, values = table.decoding()
    rules, contexts = elements.rules, table.contexts
    if table.dense:
        failed = decode_values(base, out, rules, contexts, values, words, extras)
    else:
        failed = decode_changes(base, out, rules, contexts, len(table.values), gaps, values, words, extras)
    if failed:
        raise ValueError("its code ends too early or too late")
