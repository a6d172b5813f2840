"""One block of elements against a base, in the smallest form that gives it back to the bit."""

from __future__ import annotations

import struct
import threading
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from .compression import compress, decompress
from .elements import CHUNK, Carrier, Elements
from .fitting import changes_of
from .tables import MOST_CONTEXTS, FrequencyTable

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


def _scratch(name: str, nbytes: int) -> NDArray[np.uint8]:
    """Room of at least ``nbytes``, kept per thread and name."""
    kept: dict[str, NDArray[np.uint8]] = vars(_local)
    if name not in kept or len(kept[name]) < nbytes:
        kept[name] = np.empty(nbytes, np.uint8)
    return kept[name]


def encode(
    base: Carrier | None, tuned: Carrier, elements: Elements, table: FrequencyTable | None
) -> tuple[Form, bytes, int]:
    """The smallest form of ``tuned`` (CODED only with a ``table``), and how many elements changed."""
    from .kernels import differences

    against = np.zeros_like(tuned) if base is None else base
    numbers = _scratch("numbers", tuned.nbytes)[: tuned.nbytes].view(tuned.dtype)
    differences(against, tuned, elements.rules, numbers)
    changes = len(tuned) if base is None else int(np.count_nonzero(numbers))
    if changes == 0 and base is not None:
        return Form.SAME, b"", 0
    coded = None if table is None else _coded(against, numbers, elements, table)
    if coded is not None and len(coded) < tuned.nbytes:
        form, code = Form.CODED, coded
    else:
        form, code = Form.RAW, tuned.tobytes()
    if base is None or len(code) >= _POOR * tuned.nbytes:
        packed = compress(tuned.tobytes(), _ZSTD_LEVEL)
        if len(packed) < len(code):
            form, code = Form.ZSTD, packed
    if base is not None and changes * (1 + elements.size) < len(code):
        changed = _changes(base, tuned, len(code))
        if changed is not None:
            form, code = Form.CHANGED, changed
    return form, code, changes


def encode_fast(base: Carrier | None, tuned: Carrier) -> tuple[Form, bytes]:
    """As `encode`, in forms that are decoded about as fast as memory is copied."""
    if base is not None and np.array_equal(base, tuned):
        return Form.SAME, b""
    changed = None if base is None else _changes(base, tuned, tuned.nbytes)
    return (Form.RAW, tuned.tobytes()) if changed is None else (Form.CHANGED, changed)


def _coded(base: Carrier, numbers: Carrier, elements: Elements, table: FrequencyTable) -> bytes:
    """The code of the differences ``numbers``."""
    from .kernels import classify, encode_changes, encode_values

    n = len(base)
    values, kinds = table.values.encoding, _scratch("kinds", 2 * n + 2 * MOST_CONTEXTS).view(np.uint16)
    words = _scratch("words", 4 * n + 256).view("<u2")
    extras = _scratch("extras", 16 * n + 256).view("<u4")
    if table.gaps is None:
        wide = _scratch("wide", 4 * n + 4).view(np.uint32)
        classify(numbers, values[0], kinds)
        w, e = encode_values(
            base, numbers, elements.rules, table.contexts, values, kinds, wide, words, extras
        )
    else:
        events = changes_of(base, numbers, elements, table.contexts)
        count, most, gaps = len(events[0]), len(table.starts), table.gaps.encoding
        steps = np.empty(count, np.uint16)
        classify(events[1], gaps[0], steps)
        classify(events[2], values[0], kinds)
        w, e = encode_changes(count, most, *events, steps, kinds, gaps, values, words, extras)
    padding = bytes(2 * ((len(words) - w) % 2))
    return b"".join([words[w:].tobytes(), padding, extras[:e][::-1].tobytes()])


def _changes(base: Carrier, tuned: Carrier, most: int) -> bytes | None:
    """Positions and XORs of the changed elements, if they take less than ``most`` bytes."""
    positions = np.flatnonzero(base != tuned)
    if len(positions) * (1 + base.itemsize) >= most:
        return None
    flips = base[positions] ^ tuned[positions]
    steps = np.diff(positions, prepend=-1) - 1
    best = min((_stepped(steps, flips, np.dtype(kind)) for kind in ("u1", "<u2")), key=len)
    return best if len(best) < most else None


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
    """Fill ``out`` with the block of ``code``, in bounded work and memory; a ``ValueError`` if damaged."""
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

    if len(code) % 4:
        raise ValueError("its code has another length")
    before = 8 * CHUNK + 64  # what the kernels may read around the code
    room = _scratch("code", before + len(code) + before)
    room[before : before + len(code)] = np.frombuffer(code, np.uint8)
    words, extras = room[: len(room) // 4 * 4].view("<u2"), room[: len(room) // 4 * 4].view("<u4")
    w, e = before // 2, (before + len(code)) // 4 - 1
    rules, contexts, values = elements.rules, table.contexts, table.values.decoding()
    if table.gaps is None:
        found = [np.empty(CHUNK + 1, kind) for kind in (base.dtype, "u8")]
        w, e, done = decode_values(base, out, rules, contexts, values, words, w, extras, e, tuple(found))
    else:
        most, gaps, left = len(table.starts), table.gaps.decoding(), np.empty(256, np.int64)
        w, e, done = decode_changes(base, out, rules, contexts, most, gaps, values, words, w, extras, e, left)
    left = 2 * (e + 1) - w
    if not done or left not in (0, 1) or (left and words[w]):
        raise ValueError("its code ends too early or too late")
