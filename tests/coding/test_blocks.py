"""Blocks: every form gives back every bit, sizes near the entropy, and damaged code is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coding.pairs import changed, conditional_entropy, odd, weights
from coding.reference import WIDTHS
from coding.test_kernels import coded, stored
from neftsurgery.coding.blocks import Form, decode, encode, encode_fast
from neftsurgery.coding.elements import BLOCK, Elements
from neftsurgery.coding.fitting import fit

LENGTHS = st.sampled_from([0, 1, 2, 3, 255, 256, 257, 4000])
SHARES = st.sampled_from([0.0, 1e-3, 0.02, 0.3, 0.9, 1.0])
KINDS = st.sampled_from(["steps", "noise", "odd"])


def decoded(form: int, code: bytes, base, like: np.ndarray, elements: Elements, table) -> np.ndarray:
    out = np.full_like(like, 0x55)
    decode(form, code, base, out, elements, table)
    return out


@pytest.mark.parametrize("dtype", WIDTHS)
@settings(max_examples=15)
@given(
    st.integers(0, 2**32), st.sampled_from([0, 1, 2, 3, 255, 256, 257, 4000]), SHARES, KINDS, st.booleans()
)
def test_every_bit_comes_back(
    dtype: str, seed: int, length: int, share: float, kind: str, based: bool
) -> None:
    """With and without a base, with and without a table, in the small forms and the fast ones."""
    rng, elements = np.random.default_rng(seed), Elements.of(dtype)
    base = weights(dtype, length, rng)
    tuned = changed(dtype, base, share, kind, rng)
    against = base if based else None
    table = stored(fit([(base if based else np.zeros_like(base), tuned)], elements))
    changes = int((base != tuned).sum()) if based else length
    for form, code, *found in (
        encode(against, tuned, elements, table),
        encode(against, tuned, elements, None),
        encode_fast(against, tuned),
    ):
        assert len(code) <= tuned.nbytes
        assert found in ([], [changes])
        assert (form == Form.SAME) == (based and np.array_equal(base, tuned))
        np.testing.assert_array_equal(decoded(form, code, against, tuned, elements, table), tuned)


def test_each_form_is_used_where_it_is_smallest() -> None:
    rng, elements = np.random.default_rng(0), Elements.of("BF16")
    base = weights("BF16", 5000, rng)
    noise = changed("BF16", base, 1.0, "noise", rng)
    one = base.copy()
    one[7] ^= np.uint16(9)
    steps = changed("BF16", base, 0.2, "steps", rng)
    table = stored(fit([(base, steps)], elements))
    forms = {
        Form.SAME: encode(base, base.copy(), elements, table),
        Form.CODED: encode(base, steps, elements, table),
        Form.CHANGED: encode(base, one, elements, table),
        Form.ZSTD: encode(None, np.tile(noise[:50], 100), elements, table),
        Form.RAW: encode(base, noise, elements, None),
    }
    assert [form for form, *_ in forms.values()] == list(forms)
    assert encode_fast(base, one)[0] == Form.CHANGED
    assert encode_fast(base, noise)[0] == encode_fast(None, noise)[0] == Form.RAW


@pytest.mark.parametrize("gap", [254, 255, 256, 257, 511, 512, 513, 65535, 65536, 65537, 131072])
def test_far_apart_changes_take_several_steps(gap: int) -> None:
    """Around the widest step of one byte, and of two: ``gap`` elements before the change."""
    elements, base = Elements.of("F32"), np.arange(gap + 3, dtype=np.uint32)
    tuned = base.copy()
    tuned[gap] ^= np.uint32(1 << 31)
    form, code = encode_fast(base, tuned)
    assert form == Form.CHANGED
    np.testing.assert_array_equal(decoded(form, code, base, tuned, elements, None), tuned)


def test_a_moved_zero_and_every_odd_value_into_every_other() -> None:
    for dtype in WIDTHS:
        values = np.array(odd(dtype), f"u{WIDTHS[dtype] // 8}")
        base, tuned = np.repeat(values, len(values)), np.tile(values, len(values))
        elements = Elements.of(dtype)
        table = stored(fit([(base, tuned)], elements))
        np.testing.assert_array_equal(
            decoded(1, coded(base, tuned, elements, table), base, tuned, elements, table), tuned
        )


def trained(dtype: str, moved: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the size of a model's, and what small updates make of them."""
    rng = np.random.default_rng(3)
    master = (0.02 * rng.standard_normal(BLOCK)).astype(np.float32)
    if dtype == "F32":
        tuned = master + np.float32(moved) * rng.standard_normal(BLOCK, np.float32)
        return master.view("u4"), tuned.view("u4")

    def rounded(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)

    base = rounded(master)
    exact = (base.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return base, rounded(exact + np.float32(moved) * rng.standard_normal(BLOCK, np.float32))


@pytest.mark.parametrize(
    ("moved", "least", "most", "within"),
    [(1.15e-5, 0.11, 0.15, 1.02), (2.5e-7, 0.002, 0.004, 1.10)],
    ids=["fine-tuning", "a step of reinforcement learning"],
)
def test_the_code_is_near_its_entropy(moved: float, least: float, most: float, within: float) -> None:
    base, tuned = trained("BF16", moved)
    assert least < (base != tuned).mean() < most
    elements = Elements.of("BF16")
    table = stored(fit([(base, tuned)], elements))
    form, code, _ = encode(base, tuned, elements, table)
    assert form == Form.CODED
    assert len(code) < within * conditional_entropy("BF16", base, tuned)
    np.testing.assert_array_equal(decoded(form, code, base, tuned, elements, table), tuned)


def test_float32_takes_about_half() -> None:
    base, tuned = trained("F32", 1e-5)
    elements = Elements.of("F32")
    table = stored(fit([(base, tuned)], elements))
    form, code, _ = encode(base, tuned, elements, table)
    assert form == Form.CODED
    assert len(code) < 0.52 * tuned.nbytes
    np.testing.assert_array_equal(decoded(form, code, base, tuned, elements, table), tuned)


def mangled(code: bytes, rng: np.random.Generator) -> bytes:
    """A code with bits flipped, bytes cut off, added, replaced or moved, or another count."""
    content = bytearray(code)
    where = int(rng.integers(0, len(content) + 1))
    match int(rng.integers(0, 7)):
        case 0 if content:
            content[where % len(content)] ^= 1 << int(rng.integers(0, 8))
        case 1:
            del content[where:]
        case 2:
            content += rng.bytes(int(rng.integers(1, 9)))
        case 3:
            content[:4] = int(rng.integers(0, 1 << 32)).to_bytes(4, "little")
        case 4:
            content[:4] = int(rng.integers(0, len(content) // 4 + 2)).to_bytes(4, "little")
        case 5:
            content[where:] = rng.bytes(len(content) - where)
        case _:
            content[4:] = content[8:] + content[4:8]
    return bytes(content)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "U8"])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_damaged_code_is_refused_or_gives_another_result(dtype: str, share: float) -> None:
    rng, elements = np.random.default_rng(5), Elements.of(dtype)
    base = weights(dtype, 2000, rng)
    tuned = changed(dtype, base, share, "steps", rng)
    table = stored(fit([(base, tuned)], elements))
    codes = [
        (Form.CODED, coded(base, tuned, elements, table)),
        encode_fast(base, changed(dtype, base, 0.05, "noise", rng)),
        encode(None, np.zeros_like(base), elements, None)[:2],
        (Form.RAW, tuned.tobytes()),
        (Form.SAME, b""),
    ]
    refused = 0
    for form, code in codes:
        for _ in range(200):
            wrong = mangled(code, rng)
            for wanted in (form, int(rng.integers(0, 9))):
                try:
                    decoded(wanted, wrong, base, tuned, elements, table)
                except ValueError:
                    refused += 1
    assert refused > 800


def test_forms_without_what_they_need_are_refused() -> None:
    elements, base = Elements.of("U8"), np.arange(9, dtype=np.uint8)
    for form, code, against in (
        (Form.SAME, b"", None),
        (Form.CODED, bytes(20), base),
        (Form.SAME, b"x", base),
    ):
        with pytest.raises(ValueError, match="form"):
            decoded(form, code, against, base, elements, None)
