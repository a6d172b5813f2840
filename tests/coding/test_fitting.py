"""Tables that fit a sample: any difference can be coded by them, and frequent ones in few bits."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coding import reference
from coding.pairs import changed, conditional_entropy, weights
from coding.test_kernels import coded, stored
from neftsurgery.coding.blocks import Form, decode
from neftsurgery.coding.elements import BLOCK, Elements
from neftsurgery.coding.fitting import fit, fit_memory
from neftsurgery.coding.tables import MOST_CONTEXTS, Alphabet, FrequencyTable
from neftsurgery.storage.threads import DEFAULT_MEMORY


def fitted(dtype: str, share: float, kind: str = "steps", length: int = 4000) -> FrequencyTable:
    rng = np.random.default_rng(7)
    base = weights(dtype, length, rng)
    return fit([(base, changed(dtype, base, share, kind, rng))], Elements.of(dtype))


def ranges(alphabet: Alphabet) -> list[range]:
    """The numbers of each symbol."""
    pairs = zip(alphabet.tops.tolist(), alphabet.bits.tolist(), strict=True)
    return [range(top << plain, (top + 1) << plain) for top, plain in pairs]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("dtype", reference.WIDTHS)
def test_any_difference_can_be_coded_in_every_context(dtype: str, share: float) -> None:
    table = fitted(dtype, share, "noise", 1000)
    assert (table.gaps is None) == (share > 0.25)
    assert 1 <= len(table.starts) <= MOST_CONTEXTS
    assert table.starts[0] == 0
    assert (np.diff(table.starts.astype(int)) > 0).all()
    alphabets = [(table.values, 1 << reference.WIDTHS[dtype])]
    if table.gaps is not None:
        alphabets.append((table.gaps, 1 << 20))
        never = ranges(table.gaps).index(range(1 << 20, (1 << 20) + 1))
        assert table.gaps.frequencies[:, never].all()
    for alphabet, end in alphabets:
        assert len(alphabet.tops) <= 256
        assert (alphabet.frequencies.sum(axis=1) == 4096).all()
        assert alphabet.frequencies[:, ranges(alphabet).index(range(end))].all(), "for what did not occur"


def test_frequent_differences_get_their_share() -> None:
    """A zigzag step of 2 or 4 in half of the changes each: half of the frequencies each."""
    base = np.full(9000, 0x3F80, np.uint16)
    tuned = base.copy()
    tuned[::10] += np.uint16(1)
    tuned[5::10] += np.uint16(2)
    table = fit([(base, tuned)], Elements.of("BF16"))
    assert table.gaps is not None
    for alphabet, number, expected in (
        (table.values, 2, 2048),
        (table.values, 4, 2048),
        (table.gaps, 4, 4090),
    ):
        symbol = ranges(alphabet).index(range(number, number + 1))
        assert abs(int(alphabet.frequencies[0, symbol]) - expected) < 5


def test_numbers_that_are_alike_share_a_symbol() -> None:
    """Uniform differences take one symbol for many; one that stands out among them has its own."""
    rng = np.random.default_rng(0)
    base = np.full(100_000, 1 << 15, np.uint16)
    steps = np.where(rng.random(len(base)) < 0.3, 5, rng.integers(-16, 16, len(base)))
    table = fit([(base, base + steps.astype(np.uint16))], Elements.of("U16"))
    found = ranges(table.values)
    assert range(10, 11) in found
    assert len(found) < 10
    assert table.gaps is None


def test_single_numbers_that_come_often_have_symbols_of_their_own() -> None:
    """Zeros that one step of an optimizer moves by its rate, either way: about a bit each."""
    rng = np.random.default_rng(2)
    base = weights("BF16", 200_000, rng)
    base[rng.random(len(base)) < 0.05] = 0
    tuned = np.where(base == 0, np.array([0x3586, 0xB586], np.uint16)[rng.integers(0, 2, len(base))], base)
    elements = Elements.of("BF16")
    table = stored(fit([(base, tuned)], elements))
    assert {range(2 * 0x3586, 2 * 0x3586 + 1), range(2 * 0x3586 + 1, 2 * 0x3586 + 2)} <= {
        *ranges(table.values)
    }
    assert len(coded(base, tuned, elements, table)) < 1.05 * conditional_entropy("BF16", base, tuned)


def test_what_no_sample_had_in_a_context_is_coded() -> None:
    """A table of one block codes another, in whose contexts are numbers that only other contexts had."""
    elements, rng = Elements.of("BF16"), np.random.default_rng(3)
    base = np.repeat(np.array([0x3F80, 0x4F80], np.uint16), 20_000)
    tuned = base.copy()
    tuned[:20_000:9] += np.uint16(1)
    tuned[20_000::7] += np.uint16(300)
    table = stored(fit([(base, tuned)], elements))
    assert len(table.starts) == 2
    other = base[::-1].copy()
    new = other + np.array([0, 1, 300, 5000], np.uint16)[rng.integers(0, 4, len(base))]
    out = np.empty_like(new)
    decode(Form.CODED, coded(other, new, elements, table), other, out, elements, table)
    np.testing.assert_array_equal(out, new)


@pytest.mark.parametrize("step", [1 << 20, 1 << 45])
def test_one_large_step_of_wide_elements_is_coded_well(step: int) -> None:
    """A step that all changed elements make, whether a table can name it or not."""
    rng = np.random.default_rng(4)
    base = rng.integers(1 << 60, 1 << 61, 50_000, np.uint64)
    tuned = base + np.where(rng.random(len(base)) < 0.5, np.uint64(step), np.uint64(0))
    elements = Elements.of("U64")
    table = stored(fit([(base, tuned)], elements))
    code = coded(base, tuned, elements, table)
    plain = 0 if step < 1 << 31 else step.bit_length() - 5  # without the bits that tell its fine class
    assert len(code) < 1.02 * len(base) * (1 + plain / 2) / 8
    out = np.empty_like(tuned)
    decode(Form.CODED, code, base, out, elements, table)
    np.testing.assert_array_equal(out, tuned)


@pytest.mark.parametrize(("dtype", "blocks"), [("BF16", 12), ("F32", 3)])
def test_a_table_takes_as_much_memory_as_is_said(dtype: str, blocks: int) -> None:
    rng = np.random.default_rng(0)
    base = weights(dtype, BLOCK, rng)
    pair = base, changed(dtype, base, 0.05, "steps", rng)
    fit([pair], Elements.of(dtype))  # compiles
    tracemalloc.start()
    try:
        fit([tuple(side.copy() for side in pair) for _ in range(blocks)], Elements.of(dtype))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = fit_memory(blocks, base.nbytes)
    assert 0.8 * said < peak <= said
    assert DEFAULT_MEMORY // said >= 2  # two threads make tables by default
