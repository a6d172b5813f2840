"""Tables of frequencies: what rANS needs of them, how they are stored, and damaged ones."""

from __future__ import annotations

import numpy as np
import pytest

from coding.pairs import changed, weights
from neftsurgery.coding.compression import compress, content_size, decompress
from neftsurgery.coding.elements import Elements
from neftsurgery.coding.fitting import fit
from neftsurgery.coding.tables import MOST_TABLES, FrequencyTable, pack, unpack


def fitted(dtype: str, share: float, kind: str = "steps", length: int = 4000) -> FrequencyTable:
    rng = np.random.default_rng(7)
    base = weights(dtype, length, rng)
    return fit([(base, changed(dtype, base, share, kind, rng))], Elements.of(dtype))


def test_packed_tables_come_back() -> None:
    tables = [fitted("BF16", 0.1), fitted("F32", 1.0), fitted("U8", 0.0)]
    found = unpack(pack(tables), 3)
    for one, other in zip(tables, found, strict=True):
        np.testing.assert_array_equal(one.starts, other.starts)
        np.testing.assert_array_equal(one.contexts, other.contexts)
        assert (one.gaps is None) == (other.gaps is None)
        pairs = [(one.values, other.values)]
        if one.gaps is not None and other.gaps is not None:
            pairs.append((one.gaps, other.gaps))
        for mine, theirs in pairs:
            for name in ("tops", "bits", "frequencies", "least"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
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
        lambda good: b"\0" + good[1:],  # no context
        lambda good: b"\xff" + good[1:],  # too many
        lambda good: good[:2] + b"\xff" + good[3:],  # more symbols than there are
        lambda good: good[:3] + b"\0\0" + good[5:],  # no symbol for values
        lambda good: good[:5] + b"\1" + good[6:],  # the first context begins late
        lambda good: good[:6] + b"\0" + good[7:],  # the second one with it
        lambda good: good[:-2] + b"\xff\xff",  # another sum
        lambda good: good + good,  # one table more than blocks
    ],
)
def test_damaged_tables_are_refused(forge) -> None:
    base = np.repeat(np.array([0x3F80, 0x4F80], np.uint16), 20_000)
    tuned = base.copy()
    tuned[:20_000:9] += np.uint16(1)
    good = bytes(raw(fit([(base, tuned)], Elements.of("BF16"))))
    assert good[0] == 2, "contexts"
    assert unpack(compress(good, 1), 1)
    with pytest.raises(ValueError, match="tables"):
        unpack(compress(forge(good), 1), 1)


def test_no_more_room_is_made_than_tables_can_take() -> None:
    with pytest.raises(ValueError, match="too large"):
        unpack(compress(bytes(200_000), 1), 3)
    with pytest.raises(ValueError, match="too large"):
        unpack(compress(bytes((MOST_TABLES + 1) * 36_000), 1), 1 << 30)
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
