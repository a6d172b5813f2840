"""Elements as integers: which carrier, which context, which order, for every dtype of safetensors."""

from __future__ import annotations

import numpy as np
import pytest

from coding import reference
from coding.pairs import odd
from neftsurgery.coding.elements import Elements
from neftsurgery.tensors.dtypes import DTYPES


def test_every_dtype_has_elements_of_whole_bytes() -> None:
    assert DTYPES.keys() == reference.WIDTHS.keys()
    for dtype, width in reference.WIDTHS.items():
        elements = Elements.of(dtype)
        assert elements.carrier == np.dtype(f"u{width // 8}")
        assert elements.size == width // 8


@pytest.mark.parametrize("dtype", reference.WIDTHS)
def test_the_rules_give_the_context_and_the_order_of_the_definition(dtype: str) -> None:
    shift, mask, top, full, negative, positive = map(int, Elements.of(dtype).rules)
    assert full == 2 * top - 1 == (1 << reference.WIDTHS[dtype]) - 1
    rng = np.random.default_rng(0)
    for bits in [*odd(dtype), *(int.from_bytes(rng.bytes(8), "little") & full for _ in range(99))]:
        assert (bits >> shift) & mask == reference.exponent(dtype, bits) < 256
        assert bits ^ (negative if bits & top else positive) == reference.place(dtype, bits)


@pytest.mark.parametrize(
    ("dtype", "native"), [("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8"), ("C64", "<f4")]
)
def test_the_order_is_that_of_the_values(dtype: str, native: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(500) * 10.0 ** rng.integers(-5, 4, 500)
    floats = np.unique(np.append(values.astype(native), [-np.inf, np.inf]).astype(native))
    places = [reference.place(dtype, int(bits)) for bits in floats.view(f"u{floats.itemsize}")]
    assert places == sorted(set(places))
    zeros = [reference.place(dtype, bits) for bits in (1 << (reference.WIDTHS[dtype] - 1), 0)]
    assert zeros[1] - zeros[0] == 1, "-0 comes before 0, and is not 0"
