"""Tables of frequencies: what rANS needs of them, how they are stored, and damaged ones."""

from __future__ import annotations

import numpy as np
import pytest

from coding import reference
from coding.pairs import changed, weights
from neftsurgery.coding.compression import compress, content_size, decompress
from neftsurgery.coding.elements import Elements
from neftsurgery.coding.tables import MOST_CONTEXTS, MOST_TABLES, FrequencyTable, fit, pack, unpack

PIECE = 256 + 2 * 81 + 2 * 256  # of the raw form of a table with one context and gaps


def fitted(dtype: str, share: float, kind: str = "steps", length: int = 4000) -> FrequencyTable:
    rng = np.random.default_rng(7)
    base = weights(dtype, length, rng)
    return fit([(base, changed(dtype, base, share, kind, rng))], Elements.of(dtype))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("dtype", reference.WIDTHS)
def test_any_difference_can_be_coded_in_every_context(dtype: str, share: float) -> None:
    table = fitted(dtype, share, "noise", 1000)
    reachable = 1 + max(one for one in range(256) if reference.least(one)[0] < 1 << reference.WIDTHS[dtype])
    assert table.dense == (share > 0.5)
    assert 1 <= len(table.values) <= MOST_CONTEXTS
    assert table.contexts.max() == len(table.values) - 1
    assert (np.diff(table.contexts.astype(int)) >= 0).all(), "neighbours share a context"
    for part, used in ((table.gaps, 81), (table.values, reachable)):
        assert (part[:, :used] > 0).all()
        assert not part[:, used:].any()
        assert (part.sum(axis=1) == 4096).all()


def test_frequent_differences_get_their_share() -> None:
    """A zigzag step of 1 or 3 in half of the changes each: half of the frequencies each."""
    base = np.full(9000, 0x3F80, np.uint16)
    tuned = base.copy()
    tuned[::10] += np.uint16(1)
    tuned[5::10] += np.uint16(2)
    table = fit([(base, tuned)], Elements.of("BF16"))
    assert abs(int(table.values[0, 1]) - 2048) < 40, "zigzag 2, less one"
    assert abs(int(table.values[0, 3]) - 2048) < 40, "zigzag 4, less one"
    assert table.gaps[0, 1 + 4] > 3900, "four unchanged elements between two changes"


def test_packed_tables_come_back() -> None:
    tables = [fitted("BF16", 0.1), fitted("F32", 1.0), fitted("U8", 0.0)]
    found = unpack(pack(tables), 3)
    for one, other in zip(tables, found, strict=True):
        for name in ("contexts", "gaps", "values"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert unpack(pack([]), 0) == []


def raw(table: FrequencyTable) -> bytearray:
    packed = pack([table])
    return bytearray(decompress(packed, content_size(packed)))


@pytest.mark.parametrize(
    "forge",
    [
        lambda good: good[:-1],
        lambda good: good[:1],
        lambda good: good + b"\1",
        lambda good: b"\0" + good[1:],
        lambda good: b"\xff" + good[1:],
        lambda good: good[:1] + b"\1" + good[2:],
        lambda good: good[:2] + b"\xff" + good[3:],
        lambda good: good[:-2] + b"\xff\xff",
        lambda good: good[:258] + b"\0\0" + good[260:],
    ],
)
def test_damaged_tables_are_refused(forge) -> None:
    good = bytes(raw(fitted("BF16", 0.1)))
    assert unpack(compress(good, 1), 1)
    with pytest.raises(ValueError, match="tables"):
        unpack(compress(forge(good), 1), 1)


def test_no_more_room_is_made_than_tables_can_take() -> None:
    with pytest.raises(ValueError, match="too large"):
        unpack(compress(bytes(70_000_000), 1), 3)
    with pytest.raises(ValueError, match="too large"):
        unpack(compress(bytes((MOST_TABLES + 1) * 21_826), 1), 1 << 30)
    for content in (b"", b"zstd", compress(b"x" * 99, 1)[:-1], compress(b"x", 1) + b"\0"):
        with pytest.raises(ValueError, match=r"zstd|length"):
            unpack(content, 1)


def test_a_frame_that_lies_about_its_size_gets_no_room() -> None:
    claimed = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + b"\1\0\0"
    assert content_size(claimed) == 1 << 60
    bomb = compress(bytes(1 << 24), 1)
    for packed, size in ((claimed, 10), (bomb, 10), (bomb, 1 << 25), (compress(b"abc", 1), 2)):
        with pytest.raises(ValueError, match="length"):
            decompress(packed, size)
    assert decompress(bomb, 1 << 24) == bytes(1 << 24)
