"""The compiled coders against a slow reader that is written from the definitions of the format alone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coding import reference
from coding.pairs import changed, weights
from neftsurgery.coding.blocks import Form, decode, encode
from neftsurgery.coding.elements import Elements, fine_classes
from neftsurgery.coding.fitting import fit
from neftsurgery.coding.kernels import classify, differences
from neftsurgery.coding.tables import Alphabet, FrequencyTable, pack, unpack


def stored(table: FrequencyTable) -> FrequencyTable:
    """A table as it comes out of a file."""
    (found,) = unpack(pack([table]), 1)
    return found


def read_slowly(dtype: str, base: np.ndarray, code: bytes, table: FrequencyTable) -> list[int]:
    def plain(one: Alphabet) -> reference.Alphabet:
        symbols = list(zip(one.tops.tolist(), one.bits.tolist(), strict=True))
        return symbols, one.frequencies.tolist()

    gaps = None if table.gaps is None else plain(table.gaps)
    return reference.decode(dtype, base.tolist(), code, table.starts.tolist(), gaps, plain(table.values))


@pytest.mark.parametrize("width", [8, 16, 20, 32, 64])
def test_fine_classes_cover_all_numbers_without_gaps(width: int) -> None:
    """And they are those of the kernels: at both ends of every class."""
    least, plain = (part.tolist() for part in fine_classes(width))
    ends = [start + (1 << bits) for start, bits in zip(least, plain, strict=True)]
    assert [0, *ends] == [*least, 1 << width]
    numbers = np.array([*least, *(end - 1 for end in ends)], np.uint64)
    classes = np.empty(len(numbers), np.uint16)
    classify(numbers, np.empty(0, np.uint64), classes)
    assert classes.tolist() == 2 * list(range(len(least)))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "I8", "U64", "F4"])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    length=st.sampled_from([1, 2, 3, 64, 400]),
    share=st.sampled_from([0.02, 0.3, 0.9, 1.0]),
    kind=st.sampled_from(["steps", "noise", "odd"]),
    other=st.booleans(),
)
def test_a_slow_reader_reads_what_they_write(
    dtype: str, seed: int, length: int, share: float, kind: str, other: bool
) -> None:
    """``other``: by a table that was made from other elements, as most blocks are."""
    rng, elements = np.random.default_rng(seed), Elements.of(dtype)
    base = weights(dtype, length, rng)
    tuned = changed(dtype, base, share, kind, rng)
    if not (base != tuned).any():
        tuned[0] ^= tuned.dtype.type(1)
    sample = (base, changed(dtype, base, 0.05, "steps", rng)) if other else (base, tuned)
    table = stored(fit([sample], elements))
    code = coded(base, tuned, elements, table)
    assert read_slowly(dtype, base, code, table) == tuned.tolist()
    out = np.empty_like(tuned)
    decode(Form.CODED, code, base, out, elements, table)
    np.testing.assert_array_equal(out, tuned)


def coded(base: np.ndarray, tuned: np.ndarray, elements: Elements, table: FrequencyTable) -> bytes:
    """The CODED form, also where another one is smaller."""
    from neftsurgery.coding import blocks

    numbers = np.empty_like(base)
    differences(base, tuned, elements.rules, numbers)
    return blocks._coded(base, numbers, elements, table)


@pytest.mark.parametrize("share", [0.003, 0.13, 1.0])
def test_a_whole_block_survives(share: float) -> None:
    rng, elements = np.random.default_rng(1), Elements.of("BF16")
    base = weights("BF16", 1 << 20, rng)
    tuned = changed("BF16", base, share, "noise", rng)
    table = stored(fit([(base, tuned)], elements))
    form, code, _ = encode(base, tuned, elements, table)
    out = np.empty_like(tuned)
    decode(form, code, base, out, elements, table)
    np.testing.assert_array_equal(out, tuned)


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["sparse", "dense"])
def test_of_a_number_beyond_an_element_only_the_lowest_bits_count(share: float) -> None:
    rng, elements = np.random.default_rng(2), Elements.of("BF16")
    base = weights("BF16", 2000, rng)
    tuned = changed("BF16", base, share, "steps", rng)
    table = stored(fit([(base, tuned)], elements))
    code = coded(base, tuned, elements, table)
    exact = table.values.bits == 0
    assert exact.any()
    tops = table.values.tops + np.where(exact, 1 << 16, 0).astype(np.uint32)
    forged = replace(table, values=replace(table.values, tops=tops))
    out = np.empty_like(tuned)
    decode(Form.CODED, code, base, out, elements, forged)
    np.testing.assert_array_equal(out, tuned)
    assert read_slowly("BF16", base, code, forged) == tuned.tolist()


BOUNDS = """
import numpy as np
from coding.pairs import changed, weights
from coding.test_blocks import mangled
from coding.test_kernels import coded, stored
from neftsurgery.coding.blocks import decode
from neftsurgery.coding.elements import Elements
from neftsurgery.coding.fitting import fit

rng = np.random.default_rng(0)
for dtype, share in (("BF16", 0.05), ("BF16", 1.0)):
    elements = Elements.of(dtype)
    for kind in ("steps", "noise"):
        base = weights(dtype, 3000, rng)
        tuned = changed(dtype, base, share, kind, rng)
        table = stored(fit([(base, tuned)], elements))
        code = coded(base, tuned, elements, table)
        out = np.empty_like(tuned)
        decode(1, code, base, out, elements, table)
        assert (out == tuned).all()
        for number in range(150):
            try:
                decode(1, mangled(code, rng), base, out, elements, table)
            except ValueError:
                pass
"""


@pytest.mark.slow
def test_no_code_leads_outside_of_an_array(tmp_path: Path) -> None:
    """With numba's own check of bounds: compiled again, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", BOUNDS],
        env={
            **os.environ,
            "NUMBA_BOUNDSCHECK": "1",
            "NUMBA_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
