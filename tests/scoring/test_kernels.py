"""The compiled arithmetic against the definitions of the formats, torch, and numpy in higher precision."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from neftsurgery.neurons.layout import Layout
from neftsurgery.scoring import engine, kernels
from neftsurgery.storage.threads import Limits
from neftsurgery.tensors.dtypes import DTYPES
from neftsurgery.tensors.header import TensorInfo

#: Exponent bits, fraction bits, bias, and how the format spells what is not finite.
DEFINITIONS = {
    "F16": (5, 10, 15, "ieee"),
    "BF16": (8, 7, 127, "ieee"),
    "F32": (8, 23, 127, "ieee"),
    "F64": (11, 52, 1023, "ieee"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3": (4, 3, 7, "all ones is NaN"),
    "F8_E4M3FNUZ": (4, 3, 8, "negative zero is NaN"),
    "F8_E5M2FNUZ": (5, 2, 16, "negative zero is NaN"),
}
SMALL = sorted(set(DEFINITIONS) - {"F32", "F64"})
ALL = sorted(DEFINITIONS)

Bits = NDArray[np.unsignedinteger]


def decoded(dtype: str, word: int) -> float:
    """The value of one bit pattern, worked out from the definition of its format."""
    exponent_bits, fraction_bits, bias, special = DEFINITIONS[dtype]
    fraction = word & ((1 << fraction_bits) - 1)
    exponent = (word >> fraction_bits) & ((1 << exponent_bits) - 1)
    negative = word >> (fraction_bits + exponent_bits)
    ones = (1 << exponent_bits) - 1
    if special == "ieee" and exponent == ones:
        magnitude = math.nan if fraction else math.inf
    elif (special == "all ones is NaN" and exponent == ones and fraction == (1 << fraction_bits) - 1) or (
        special == "negative zero is NaN" and negative and exponent == fraction == 0
    ):
        return math.nan
    elif exponent == 0:
        magnitude = math.ldexp(fraction, 1 - bias - fraction_bits)
    else:
        magnitude = math.ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits)
    return -magnitude if negative else magnitude


@cache
def table(dtype: str) -> NDArray[np.float64]:
    """The values of all bit patterns of a format of up to 16 bits."""
    return np.array([decoded(dtype, word) for word in range(1 << DTYPES[dtype].bits)])


def decode(dtype: str, bits: Bits) -> NDArray[np.float64]:
    """Bit patterns to values."""
    if dtype in ("F32", "F64"):
        return bits.view(f"f{bits.itemsize}").astype(np.float64)
    return table(dtype)[bits]


def encode(dtype: str, values: object) -> Bits:
    """Finite values to the nearest bit patterns; those out of range become the largest."""
    array = np.asarray(values, np.float64)
    if dtype == "F64":
        return array.view(np.uint64)
    if dtype == "F32":
        return array.astype(np.float32).view(np.uint32)
    known = table(dtype)
    patterns = np.flatnonzero(np.isfinite(known) & ~np.signbit(known))
    magnitudes = known[patterns]  # ascend with their patterns
    place = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(array))
    word = patterns[place].astype(DTYPES[dtype].carrier)
    # FNUZ formats have no negative zero.
    negative = np.signbit(array) & ((magnitudes[place] > 0) | ("FNUZ" not in dtype))
    sign = DTYPES[dtype].carrier.type(1 << (DTYPES[dtype].bits - 1))
    return np.where(negative, word | sign, word)


def exact(
    dtype: str, a: Bits, b: Bits, scale: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """`kernels.exact_sums`, allocating its results."""
    out, changed, finite = np.empty((7, len(a))), np.empty(len(a), np.int64), np.empty(len(a), np.bool_)
    kernels.exact_sums(dtype)(a, b, np.arange(len(a)), scale, out, changed, finite)
    return out, changed, finite


def ours(dtype: str, bits: Bits) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What the kernels take ``bits`` for: values, by multiplying each with a one, and whether finite."""
    column = np.ascontiguousarray(bits).reshape(-1, 1)
    ones = np.broadcast_to(encode(dtype, [[1.0]]), column.shape).copy()
    out, _, finite = exact(dtype, ones, column)
    return out[4], finite


def patterns_of(dtype: str) -> Bits:
    """Every bit pattern, or for the wide formats many random ones with all special ones."""
    carrier = DTYPES[dtype].carrier
    if dtype in SMALL:
        return np.arange(1 << DTYPES[dtype].bits).astype(carrier)
    rng = np.random.default_rng(5)
    bits = rng.integers(0, np.iinfo(carrier).max, 20_000, carrier, endpoint=True)
    kind = np.finfo(f"f{carrier.itemsize}")
    special = np.array(
        [0.0, np.inf, np.nan, 1.0, kind.max, kind.tiny, kind.smallest_subnormal, kind.tiny * 0.75], kind.dtype
    )
    return np.concatenate([bits, np.concatenate([special, -special]).view(carrier)])


@pytest.mark.parametrize("dtype", ALL)
def test_every_bit_pattern_means_what_its_format_says(dtype):
    bits = patterns_of(dtype)
    expected = np.array([decoded(dtype, int(word)) for word in bits])
    values, finite = ours(dtype, bits)
    np.testing.assert_array_equal(finite, np.isfinite(expected))
    np.testing.assert_array_equal(values[finite], expected[finite])
    assert 0 < finite.sum() < len(bits)


@pytest.mark.parametrize("dtype", ALL)
def test_every_bit_pattern_means_what_torch_says(dtype):
    torch = pytest.importorskip("torch")
    kind = {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }[dtype]
    bits = patterns_of(dtype)
    expected = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(kind).to(torch.float64).numpy()
    values, finite = ours(dtype, bits)
    np.testing.assert_array_equal(finite, np.isfinite(expected))
    np.testing.assert_array_equal(values[finite], expected[finite])


@pytest.mark.parametrize("dtype", ALL)
def test_the_fast_kernels_decode_alike(dtype):
    """Against a zero, the difference is the value: its square is that of a float32 (or float64)."""
    bits = patterns_of(dtype)
    zeros = np.zeros_like(bits)
    wide = np.float64 if dtype == "F64" else np.float32
    with np.errstate(all="ignore"):
        value = np.array([decoded(dtype, int(word)) for word in bits]).astype(wide)
        square = (value * value).astype(np.float64)
    sums, changed = np.empty((3, len(bits))), np.empty(len(bits), np.int64)
    kernels.run_sums(dtype)(zeros, bits, 1, sums, changed)
    columns, column_changed = np.zeros((3, len(bits))), np.zeros(len(bits), np.int64)
    kernels.column_sums(dtype)(bits, zeros, len(bits), columns, column_changed)
    good = np.isfinite(value)
    np.testing.assert_array_equal(sums[1][good], square[good])
    np.testing.assert_array_equal(columns[0][good], square[good])
    np.testing.assert_array_equal(columns[1][good], square[good])
    assert not np.isfinite(sums[1][~good]).any()
    assert not np.isfinite(columns[0][~good]).any()
    np.testing.assert_array_equal(changed, bits != 0)
    np.testing.assert_array_equal(column_changed, bits != 0)


def pair(dtype: str, shape: tuple[int, ...], seed: int) -> tuple[Bits, Bits]:
    """A tensor and one near it, about half of whose elements are the same."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(shape)
    b = np.where(rng.random(shape) < 0.5, a, a + 0.3 * rng.standard_normal(shape))
    return encode(dtype, a), encode(dtype, b)


def expected_sums(dtype: str, a: Bits, b: Bits) -> NDArray[np.float64]:
    """``a.a``, ``d.d``, ``a.d`` over the last axis, in float64."""
    x, y = decode(dtype, a), decode(dtype, b)
    d = y - x
    return np.stack([(x * x).sum(-1), (d * d).sum(-1), (x * d).sum(-1)])


def assert_sums(found: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float) -> None:
    np.testing.assert_allclose(found[:2], expected[:2], rtol=tolerance)
    size = np.sqrt(expected[0] * expected[1])
    assert (np.abs(found[2] - expected[2]) <= tolerance * size).all()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("length", [1, 2, 7, 1023, 1024, 1025, 4999])
def test_sums_of_runs(dtype, length):
    a, b = pair(dtype, (9, length), seed=length)
    sums, changed = np.full((3, 9), 7.0), np.full(9, 7)  # written, not added to
    kernels.run_sums(dtype)(a.reshape(-1), b.reshape(-1), length, sums, changed)
    assert_sums(sums, expected_sums(dtype, a, b), 1e-12 if dtype == "F64" else 2e-6)
    np.testing.assert_array_equal(changed, (a != b).sum(1))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("runs", "length"), [(1, 5), (63, 31), (64, 1), (65, 2049), (200, 2048), (5, 4099)])
def test_column_sums_are_added(dtype, runs, length):
    a, b = pair(dtype, (runs, length), seed=runs)
    sums, changed = np.zeros((3, length)), np.zeros(length, np.int64)
    for _ in range(2):
        kernels.column_sums(dtype)(a.reshape(-1), b.reshape(-1), length, sums, changed)
    assert_sums(sums, 2 * expected_sums(dtype, a.T, b.T), 1e-12 if dtype == "F64" else 2e-6)
    np.testing.assert_array_equal(changed, 2 * (a != b).sum(0))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("scale", [1.0, 2.0**-30])
def test_exact_sums(dtype, scale):
    a, b = pair(dtype, (6, 1500), seed=1)
    b[5] = a[5]
    a[4] = 0
    out, changed, finite = exact(dtype, a, b, scale)
    x, y = (decode(dtype, side).astype(np.longdouble) for side in (a, b))
    top = np.maximum(np.abs(x), np.abs(y)).max(1)
    x, y = x * scale, y * scale
    d = y - x
    aa, ad = (x * x).sum(1), (x * d).sum(1)
    r = d - np.where(aa > 0, ad / np.where(aa > 0, aa, 1), 0)[:, None] * x
    expected = [aa, (d * d).sum(1), ad, (y * y).sum(1), (x * y).sum(1), (r * r).sum(1), top]
    size = scale * scale * np.array([1.0] * 6 + [0])[:, None]
    assert (
        np.abs(out - np.array(expected, np.float64)) <= 1e-12 * np.abs(np.array(expected)) + 1e-10 * size
    ).all()
    np.testing.assert_array_equal(changed, (a != b).sum(1))
    assert finite.all()


@pytest.mark.parametrize("dtype", [dtype for dtype in ALL if DEFINITIONS[dtype][3] == "ieee"])
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_no_fast_sum_swallows_what_is_not_finite(dtype, special, sides):
    """At every place of a vector: the kernels may reorder sums, but not assume there are no NaN."""
    width = 67
    a, b = pair(dtype, (width, width), seed=2)
    word = next(
        word
        for word in (np.flatnonzero(~np.isfinite(table(dtype))) if dtype in SMALL else special_words(dtype))
        if same_kind(decoded(dtype, int(word)), special)
    )
    for row in range(width):
        if sides in ("base", "both"):
            a[row, row] = word
        if sides in ("tuned", "both"):
            b[row, row] = word
    sums, changed = np.empty((3, width)), np.empty(width, np.int64)
    kernels.run_sums(dtype)(a.reshape(-1), b.reshape(-1), width, sums, changed)
    assert not np.isfinite(sums[:2]).all(0).any()
    columns, column_changed = np.zeros((3, width)), np.zeros(width, np.int64)
    kernels.column_sums(dtype)(a.T.copy().reshape(-1), b.T.copy().reshape(-1), width, columns, column_changed)
    assert not np.isfinite(columns[:2]).all(0).any()
    np.testing.assert_array_equal(changed, (a != b).sum(1))
    np.testing.assert_array_equal(column_changed, changed)
    assert not exact(dtype, a, b)[2].any()


def special_words(dtype: str) -> Bits:
    kind = f"f{DTYPES[dtype].itemsize}"
    return np.array([np.nan, -np.nan, np.inf, -np.inf], kind).view(DTYPES[dtype].carrier)


def same_kind(value: float, other: float) -> bool:
    """Both NaN, or the same infinity."""
    return math.isnan(value) if math.isnan(other) else value == other


def test_nan_of_the_formats_without_infinity():
    for dtype in ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        a, b = pair(dtype, (40, 40), seed=3)
        (nan, *_) = np.flatnonzero(np.isnan(table(dtype)))
        np.fill_diagonal(b, nan)
        sums, changed = np.empty((3, 40)), np.empty(40, np.int64)
        kernels.run_sums(dtype)(a.reshape(-1), b.reshape(-1), 40, sums, changed)
        assert np.isnan(sums[1]).all()
        assert not exact(dtype, a, b)[2].any()


class _Zeros:
    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        out[:] = 0

    def window(self, name: str, start: int, room: NDArray[np.uint8], mapped: bool) -> None:
        return None

    def address(self, name: str) -> int:
        return -1


def test_prepared_kernels_are_the_ones_that_are_used():
    """`prepare` compiles for the very argument types of the engine: nothing is compiled under way."""
    makers = (kernels.run_sums, kernels.column_sums, kernels.exact_sums)
    for maker in makers:
        maker.cache_clear()
    kernels.prepare(["F8_E4M3", "I32", "F4", "F8_E4M3"])
    compiled = [len(maker("F8_E4M3").signatures) for maker in makers]
    assert compiled == [1, 1, 1]
    assert all(maker.cache_info().currsize == 1 for maker in makers)
    info = TensorInfo("t", "F8_E4M3", (4, 6, 5))
    jobs = [engine.Job(info, Layout(info.shape, axes)) for axes in ((0,), (1,), (2,), (0, 1), (0, 2))]
    results = list(engine.stream(_Zeros(), _Zeros(), [*jobs, engine.Job(info, None)], limits=Limits.of(1)))
    assert len(results) == 6
    assert [len(maker("F8_E4M3").signatures) for maker in makers] == compiled
