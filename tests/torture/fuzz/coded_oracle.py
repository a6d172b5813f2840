"""What a block's code stands for, by the specification alone: slow, and in plain integers."""

from __future__ import annotations

import functools
import struct
from typing import TypeAlias

import numpy as np
import zstandard
from coding import reference
from coding.reference import WIDTHS
from coding.reference import decode as decode_coded

from neftsurgery.coding.blocks import Form
from neftsurgery.coding.tables import Alphabet, FrequencyTable

__all__ = ["MOST_ELEMENTS", "expected"]

#: Larger blocks take too long.
MOST_ELEMENTS = 4096


def expected(
    dtype: str, base: bytes | None, nbytes: int, form: int, code: bytes, table: FrequencyTable | None
) -> bytes | None:
    """The bytes of a block; None if the code is damaged. ``base``: the source's, filled up with zeros."""
    parts = None
    if form == Form.CODED and table is not None:
        parts = table.starts.tobytes(), _stored(table.gaps), _stored(table.values)
    return _expected(dtype, base, nbytes, form, code, parts)


_Stored: TypeAlias = tuple[bytes, bytes, bytes]


def _stored(alphabet: Alphabet | None) -> _Stored | None:
    """What can be a key of a cache."""
    if alphabet is None:
        return None
    return alphabet.tops.tobytes(), alphabet.bits.tobytes(), alphabet.frequencies.tobytes()


@functools.lru_cache(maxsize=256)  # most blocks of a mutated patch are as they were
def _expected(
    dtype: str,
    base: bytes | None,
    nbytes: int,
    form: int,
    code: bytes,
    table: tuple[bytes, _Stored | None, _Stored | None] | None,
) -> bytes | None:
    source = bytes(nbytes) if base is None else base
    match form:
        case Form.SAME:
            return base if not code else None
        case Form.RAW:
            return code if len(code) == nbytes else None
        case Form.ZSTD:
            return _unpacked(code, nbytes)
        case Form.CHANGED:
            return _flipped(code, source, WIDTHS[dtype] // 8)
        case Form.CODED if table is not None:
            return _coded(dtype, source, code, *table)
    return None


def _unpacked(code: bytes, nbytes: int) -> bytes | None:
    """One frame that states its size, with nothing behind it."""
    try:
        if zstandard.frame_content_size(code) != nbytes:
            return None
        reader = zstandard.ZstdDecompressor().decompressobj()
        found = reader.decompress(code)
    except zstandard.ZstdError:
        return None
    return found if reader.eof and not reader.unused_data and len(found) == nbytes else None


def _flipped(code: bytes, source: bytes, size: int) -> bytes | None:
    if len(code) < 5 or code[4] not in (1, 2):
        return None
    (count,), width = struct.unpack_from("<I", code), code[4]
    if len(code) != 5 + count * (width + size):
        return None
    out, position = bytearray(source), -1
    for k in range(count):
        step = int.from_bytes(code[5 + k * width :][:width], "little")
        position += step + 1
        flip = code[5 + count * width + k * size :][:size]
        place = position * size
        if place >= len(out):
            return None
        out[place : place + size] = bytes(a ^ b for a, b in zip(out[place : place + size], flip, strict=True))
    return bytes(out)


def _coded(
    dtype: str, source: bytes, code: bytes, starts: bytes, gaps: _Stored | None, values: _Stored | None
) -> bytes | None:
    width = WIDTHS[dtype] // 8
    base = np.frombuffer(source, f"<u{width}").tolist()
    assert values is not None
    if len(code) % 4:
        return None
    try:
        some = None if gaps is None else _read(gaps)
        found = decode_coded(dtype, base, code, list(starts), some, _read(values))
    except (AssertionError, StopIteration, RuntimeError, struct.error):
        return None
    return np.array(found, f"<u{width}").tobytes()


def _read(stored: _Stored) -> reference.Alphabet:
    tops, bits, frequencies = (
        np.frombuffer(part, kind) for part, kind in zip(stored, ("<u4", "u1", "<u2"), strict=True)
    )
    pairs = list(zip(tops.tolist(), bits.tolist(), strict=True))
    return pairs, frequencies.reshape(-1, len(pairs)).tolist()
