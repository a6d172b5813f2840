"""Scores of whole tensors, of every layout and type, against an oracle that cancels nowhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from test_kernels import ALL, DEFINITIONS, SMALL, Bits, decode, decoded, encode, table

from neftsurgery.neurons.layout import Layout
from neftsurgery.scoring import kernels
from neftsurgery.scoring.engine import TensorResult, stream
from neftsurgery.scoring.partial_sums import CUT_SIZES, CutSizes, Job
from neftsurgery.storage.threads import Limits
from neftsurgery.tensors.dtypes import DTYPES
from neftsurgery.tensors.header import TensorInfo

KINDS = ("cosine", "l2", "relative", "changed", "norm", "magnitude")
LARGEST = float(np.finfo(np.float32).max)

Values = NDArray[np.float64]


class Memory:
    """Weights in memory, as the engine sees those of a file."""

    def __init__(self, arrays: Mapping[str, tuple[TensorInfo, bytes]]) -> None:
        self._arrays = arrays
        self.tensors = {name: info for name, (info, _) in arrays.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        data = self._arrays[name][1]
        assert 0 <= start <= start + len(buffer) <= len(data)
        buffer[:] = data[start : start + len(buffer)]

    def read_rows(self, name: str, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        out[:] = np.frombuffer(self._arrays[name][1], np.uint8).reshape(-1, out.shape[1])[rows]

    def window(
        self, name: str, start: int, room: NDArray[np.uint8], mapped: bool
    ) -> NDArray[np.uint8] | None:
        return None

    def address(self, name: str) -> int:
        return -1


class Mapped(Memory):
    """The same, mapped: every third window is refused."""

    asked = 0

    def window(
        self, name: str, start: int, room: NDArray[np.uint8], mapped: bool
    ) -> NDArray[np.uint8] | None:
        self.asked += 1
        if self.asked % 3 == 0 or not mapped:
            return None
        return np.frombuffer(bytearray(self._arrays[name][1]), np.uint8)[start : start + room.size]


def compare(
    dtype: str,
    a: Bits,
    b: Bits,
    axes: tuple[int, ...] | None,
    *,
    threads: int | None = None,
    piece: int = CUT_SIZES.piece,
) -> TensorResult:
    """The engine's result for one tensor."""
    info = TensorInfo("t", dtype, a.shape)
    sides = [Memory({"t": (info, np.ascontiguousarray(side).tobytes())}) for side in (a, b)]
    layout = None if axes is None else Layout(a.shape, axes)
    limits, sizes = Limits.of(threads), CutSizes(piece=piece)
    (result,) = stream(sides[0], sides[1], [Job(info, layout)], limits=limits, sizes=sizes)
    return result


def scores(
    dtype: str, a: Bits, b: Bits, axes: tuple[int, ...] = (0,), **options: int
) -> dict[str, NDArray[np.float32]]:
    """All scores of one tensor's neurons."""
    sums = compare(dtype, a, b, axes, **options).sums
    assert sums is not None
    return {kind: sums.score(kind, Layout(a.shape, axes).width) for kind in KINDS}


def reference(x: Values, y: Values, differing: NDArray[np.bool_]) -> dict[str, Values]:
    """All scores of the rows of ``x`` and ``y`` as the contract defines them, in the highest precision.

    ``1 - cos`` is half the squared distance of the two directions, which cancels nowhere. Rows are
    brought near 1 by powers of two first, so that no square leaves the range.
    """
    powers = [np.frexp(np.abs(side).max(1))[1].astype(np.int64) for side in (x, y)]
    u, v = (
        np.ldexp(side.astype(np.longdouble), -power[:, None])
        for side, power in zip((x, y), powers, strict=True)
    )
    uu, vv = (u * u).sum(1), (v * v).sum(1)
    top = np.maximum(*powers)
    d = np.ldexp(y.astype(np.longdouble), -top[:, None]) - np.ldexp(x.astype(np.longdouble), -top[:, None])
    change = np.sqrt((d * d).sum(1))
    with np.errstate(all="ignore"):
        apart = u / np.sqrt(uu)[:, None] - v / np.sqrt(vv)[:, None]
        cosine = (apart * apart).sum(1) / 2
        cosine = np.where((uu == 0) & (vv == 0), 0, np.where((uu == 0) | (vv == 0), 1, cosine))
        relative = np.ldexp(change / np.sqrt(uu), top - powers[0])
        relative = np.where(uu == 0, np.where(vv == 0, 0, LARGEST), relative)
        l2, norm = np.ldexp(change, top), np.ldexp(1 / np.sqrt(uu), -powers[0])
        magnitude = np.ldexp(np.sqrt(uu), powers[0])
    found = {
        "cosine": cosine, "l2": l2, "relative": relative, "changed": differing.mean(1), "norm": norm,
        "magnitude": magnitude,
    }  # fmt: skip
    return {kind: np.minimum(values, LARGEST).astype(np.float64) for kind, values in found.items()}


def assert_scores(found: Mapping[str, NDArray[np.float32]], expected: Mapping[str, Values]) -> None:
    """Within 1e-5 relative; an angle below float64's own precision, or a float32 underflow, is 0."""
    for kind, values in expected.items():
        assert found[kind].dtype == np.float32
        least = 1e-27 if kind == "cosine" else 2e-45
        error = np.abs(found[kind].astype(np.float64) - values)
        worst = int(np.argmax(error - 1e-5 * np.abs(values)))
        assert error[worst] <= 1e-5 * abs(values[worst]) + least, (
            kind,
            worst,
            found[kind][worst],
            values[worst],
        )


def check(dtype: str, a: Bits, b: Bits) -> None:
    """Rows of ``a`` and ``b``, scored as rows and as columns."""
    expected = reference(decode(dtype, a), decode(dtype, b), a != b)
    assert_scores(scores(dtype, a, b), expected)
    assert_scores(scores(dtype, a.T, b.T, (1,)), expected)


def fine_tuned(
    rng: np.random.Generator, rows: int, width: int, change: float, share: float
) -> tuple[Values, Values]:
    """Rows that changed by ``change`` relative to their norms, of which ``share`` lies along the row."""
    a = rng.standard_normal((rows, width))
    n = rng.standard_normal((rows, width))
    n -= ((n * a).sum(1) / (a * a).sum(1))[:, None] * a
    a_norm, n_norm = (np.linalg.norm(side, axis=1, keepdims=True) for side in (a, n))
    across = n * (a_norm / np.where(n_norm > 0, n_norm, 1))
    signs = rng.choice([-1, 1], (rows, 1))
    return a, a + change * (share * signs * a + math.sqrt(1 - share * share) * across)


# The widths: tiny, around the vector registers and the kernels' blocks, prime, and wide.
WIDTHS = (2, 3, 17, 64, 127, 1023, 1025, 4999)
# Of these shares .866 is the edge beyond which float32 sums are not trusted.
SHARES = (0, 0.5, 0.865, 0.867, 0.9, 0.974, 0.975, 0.99, 0.9999, 1)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("width", WIDTHS)
def test_light_fine_tunes(dtype, width):
    rng = np.random.default_rng(width)
    cases = itertools.product((1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), SHARES)
    rows = [fine_tuned(rng, 2, width, change, share) for change, share in cases]
    a, b = (encode(dtype, np.concatenate(side)) for side in zip(*rows, strict=True))
    assert (a != b).any(1).sum() > 4
    check(dtype, a, b)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("width", WIDTHS)
def test_large_changes(dtype, width):
    """Right angles, obtuse ones, opposite vectors, and one side much smaller than the other."""
    rng = np.random.default_rng(width + 1)
    a, n = rng.standard_normal((2, 4, width))
    tiny = 2.0**-6 if dtype.startswith("F8") else 2.0**-12
    others = [n, -a, -a + 1e-1 * n, -a + 1e-3 * n, -a + 1e-5 * n, -1e-2 * a, a * tiny, n * tiny, -a * tiny]
    others += [
        tiny * (a + 0.01 * n),
        2 * a,
        0.5 * a,
        1.1 * a,
        3 * a + n,
        -0.7 * a + 0.1 * n,
        30 * a,
        30 * a + n,
    ]
    pairs = [(a, other) for other in others] + [(other, a) for other in others]
    check(dtype, *(encode(dtype, np.concatenate(side)) for side in zip(*pairs, strict=True)))


SCALES = {
    "F32": (1e-24, 3e19, 1e-19, 1e-15, 1e-30, 1e18, 1e30),
    "BF16": (1e-24, 3e19, 1e-19, 1e-30, 1e18, 1e30),
    "F64": (1e-24, 3e19, 1e-60, 1e60, 1e-80, 1e80, 1e-150, 1e150, 1e-200, 1e200, 1e-290, 1e290),
    "F16": (1e-3, 1e-5, 1e3),
    "F8_E5M2": (1e-3, 1e3),
    "F8_E5M2FNUZ": (1e-3, 1e3),
    "F8_E4M3": (1e-1, 1e1),
    "F8_E4M3FNUZ": (1e-1, 1e1),
}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("width", [2, 31, 1500])
def test_rows_far_from_one(dtype, width):
    rng = np.random.default_rng(width + 2)
    rows = []
    for scale in SCALES[dtype]:
        for change, share in itertools.product((1e-1, 1e-3, 1e-5), (0, 0.9, 0.9999, 1)):
            a, b = fine_tuned(rng, 1, width, change, share)
            rows += [(scale * a, scale * b)]
        rows += [(scale * a, -scale * a), (scale * a, 0 * a), (0 * a, scale * a)]
        if 1e-100 < scale < 1e100:  # beyond, one side's squares leave float64's range when the other's do not
            rows += [(scale * a, a), (a, scale * a), (scale * a, b), (b, scale * a)]
    check(dtype, *(encode(dtype, np.concatenate(side)) for side in zip(*rows, strict=True)))


@pytest.mark.parametrize("dtype", ALL)
def test_zeros(dtype):
    """What the contract says of a base of 0; a negative zero differs in bits, but moves nothing."""
    zero, one = encode(dtype, [0.0] * 7), encode(dtype, [1.0] * 7)
    negative = zero if "FNUZ" in dtype else encode(dtype, [-0.0] * 7)
    some = np.where(np.arange(7) < 3, one, zero)
    pairs = [(zero, zero), (zero, negative), (negative, zero), (zero, some), (some, zero), (some, some)]
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    share = 0.0 if "FNUZ" in dtype else 1.0
    root = math.sqrt(3)
    expected = {
        "cosine": [0, 0, 0, 1, 1, 0],
        "l2": [0, 0, 0, root, root, 0],
        "relative": [0, 0, 0, LARGEST, 1, 0],
        "changed": [0, share, share, 3 / 7, 3 / 7, 0],
        "norm": [LARGEST, LARGEST, LARGEST, LARGEST, 1 / root, 1 / root],
    }
    assert (a[1] != b[1]).all() == bool(share)
    for result in (scores(dtype, a, b), scores(dtype, a.T, b.T, (1,))):
        for kind, values in expected.items():
            np.testing.assert_allclose(result[kind], values, rtol=1e-6, atol=0, err_msg=kind)


@pytest.mark.parametrize("dtype", ALL)
def test_subnormals_and_mixed_magnitudes(dtype):
    rng = np.random.default_rng(4)
    carrier = DTYPES[dtype].carrier
    fraction = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52, "F8_E4M3": 3, "F8_E4M3FNUZ": 3}.get(dtype, 2)
    a, b = (rng.integers(1, 1 << fraction, (40, 33)).astype(carrier) for _ in "ab")  # all subnormal
    sign = carrier.type(1 << (DTYPES[dtype].bits - 1))
    a, b = (np.where(rng.random(side.shape) < 0.5, side, side | sign) for side in (a, b))
    b[:10] = a[:10]
    b[:10, 0] ^= 1
    b[:10, 0] |= b[:10, 0] == 0
    a[20:30, 5] = b[20:30, 5] = encode(dtype, 1.0)
    if dtype != "F64":  # squares of b alone would leave float64's range
        a[30:, 5] = encode(dtype, 1.0)
    assert not np.isnan(decode(dtype, np.stack([a, b]))).any()
    check(dtype, a, b)


# Matrices of 36 neurons of 120 elements, as tensors of every sort.
LAYOUTS = {
    "rows of a linear weight": ((36, 120), (0,)),
    "columns": ((120, 36), (1,)),
    "experts, rows": ((4, 9, 120), (0, 1)),
    "experts, columns": ((4, 120, 9), (0, 2)),
    "a stack of matrices, the middle": ((5, 36, 24), (1,)),
    "a convolution": ((36, 6, 4, 5), (0,)),
    "a transposed convolution": ((6, 36, 4, 5), (1,)),
    "a 3-D convolution": ((36, 6, 1, 4, 5), (0,)),
    "two neuron axes inside": ((10, 9, 4, 12), (1, 2)),
    "two neuron axes apart": ((10, 9, 12, 4), (1, 3)),
    "alternating": ((4, 10, 9, 12), (0, 2)),
    "three neuron axes": ((3, 20, 3, 6, 4), (0, 2, 4)),
    "axes of size one": ((1, 36, 1, 120, 1), (1, 2)),
    "one row": ((1, 4320), (0,)),
    "one column": ((4320, 1), (1,)),
    "the whole tensor as one neuron": ((36, 120), ()),
    "a vector as one neuron": ((4320,), ()),
}


def shaped(matrix: Bits, shape: tuple[int, ...], axes: tuple[int, ...]) -> Bits:
    """The tensor of ``shape`` whose vectors along ``axes`` are the rows of ``matrix``."""
    order = [*axes, *(axis for axis in range(len(shape)) if axis not in axes)]
    return matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def of_all_sorts(dtype: str, rows: int, width: int) -> tuple[Bits, Bits]:
    """Rows near, far, near-parallel, equal, opposite and zero."""
    rng = np.random.default_rng(rows * width)
    a, b = (np.empty((rows, width)) for _ in "ab")
    for row in range(rows):
        share = (0, 0.9, 0.9999, 1)[row % 4]
        a[row], b[row] = (side[0] for side in fine_tuned(rng, 1, width, 10.0 ** -(1 + row % 5), share))
        if row % 9 == 5:
            b[row] = (a[row], -a[row], 0 * a[row], rng.standard_normal(width))[row // 9 % 4]
        if row % 9 == 7 and dtype in ("F32", "BF16", "F64"):
            a[row], b[row] = (side * (1e-24 if row % 2 else 3e19) for side in (a[row], b[row]))
    return encode(dtype, a), encode(dtype, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("piece", [CUT_SIZES.piece, 1000, 64])
def test_layouts(layout, piece):
    """However the vectors lie, and wherever pieces end: also in the middle of a vector."""
    shape, axes = LAYOUTS[layout]
    rows = math.prod(shape[axis] for axis in axes)
    for dtype in ("F32", "BF16", "F8_E5M2", "F64"):
        a, b = of_all_sorts(dtype, rows, math.prod(shape) // rows)
        expected = reference(decode(dtype, a), decode(dtype, b), a != b)
        for threads in (1, 3):
            result = scores(
                dtype, shaped(a, shape, axes), shaped(b, shape, axes), axes, threads=threads, piece=piece
            )
            assert_scores(result, expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_windows_give_the_bits_that_reads_give(layout):
    """Whatever is mapped, and however much of it at once: the same bits."""
    shape, axes = LAYOUTS[layout] if layout else ((24, 35), None)
    rows = math.prod(shape[axis] for axis in axes or (0,))
    for dtype in ("BF16", "F64", "I16", "C64"):
        kind = dtype if dtype in kernels.FORMATS else {"I16": "F16", "C64": "F64"}[dtype]
        if axes is not None and kind != dtype:
            continue
        sides = of_all_sorts(kind, rows, math.prod(shape) // rows)
        info = TensorInfo("t", dtype, shape)
        data = [{"t": (info, np.ascontiguousarray(shaped(s, shape, axes or (0,))).tobytes())} for s in sides]
        jobs = [Job(info, None if axes is None else Layout(shape, axes))]
        found, limits = [], Limits.of(2, mapped=True)
        for kind_of_weights, least in ((Memory, 64), (Mapped, 64), (Mapped, 200), (Mapped, 1 << 20)):
            sizes = CutSizes(piece=64, least_task=least, least_window=1)
            (result,) = stream(*(kind_of_weights(side) for side in data), jobs, limits=limits, sizes=sizes)
            sums = () if result.sums is None else (result.sums.aa, result.sums.dd, result.sums.ad)
            found.append((result.base_sq, result.delta_sq, result.changed, *(s.tobytes() for s in sums)))
        assert [repr(one) for one in found[1:]] == [repr(found[0])] * 3


def test_vectors_longer_than_a_piece():
    """Of the true size: more than 2 MiB a vector."""
    a, b = of_all_sorts("F16", 2, (2 << 20) // 2 + 7)
    assert a[0].nbytes > CUT_SIZES.piece
    check("F16", a, b)


@pytest.mark.parametrize("piece", [CUT_SIZES.piece, 200])
def test_the_sums_that_are_stored(piece):
    """The refined ones are those of float64, and all are within float32's precision of it."""
    a, b = of_all_sorts("F32", 90, 77)
    x, y = decode("F32", a), decode("F32", b)
    rows, columns = (compare("F32", a, b, (0,), piece=piece), compare("F32", a.T, b.T, (1,), piece=piece))
    for sums in (rows.sums, columns.sums):
        assert sums is not None
        np.testing.assert_allclose(sums.aa, (x * x).sum(1), rtol=1e-6)
        np.testing.assert_allclose(sums.dd, ((y - x) ** 2).sum(1), rtol=1e-6)
        size = np.sqrt(sums.aa * sums.dd)
        assert (np.abs(sums.ad - (x * (y - x)).sum(1)) <= 1e-6 * size).all()
        np.testing.assert_array_equal(sums.changed, (a != b).sum(1))
        parallel = np.arange(90) % 4 == 3
        exact = ((y - x) ** 2).sum(1)
        np.testing.assert_allclose(sums.dd[parallel], exact[parallel], rtol=1e-14)


def test_any_number_of_threads_gives_the_same_bits():
    infos, sides = [], ({}, {})
    for number, (dtype, (shape, axes)) in enumerate(itertools.product(ALL, LAYOUTS.values())):
        info = TensorInfo(f"t{number}", dtype, shape)
        rows = math.prod(shape[axis] for axis in axes)
        pair = of_all_sorts(dtype, rows, info.elements // rows)
        for side, matrix in zip(sides, pair, strict=True):
            side[info.name] = (info, shaped(matrix, shape, axes).tobytes())
        infos += [Job(info, Layout(shape, axes)), Job(info, None)]
    base, tuned = (Memory(side) for side in sides)

    def outcome(threads: int) -> list[bytes]:
        found = []
        results = stream(base, tuned, infos, limits=Limits.of(threads), sizes=CutSizes(piece=700))
        for job, result in zip(infos, results, strict=True):
            assert result.jobs == [job]  # in order
            found.append(repr((result.base_sq, result.delta_sq, result.changed)).encode())
            if result.sums is not None:
                s = result.sums
                found += [part.tobytes() for part in (s.aa, s.dd, s.ad, s.changed, s.finite)]
                found += [s.score(kind, job.layout.width).tobytes() for kind in KINDS]
        return found

    alone = outcome(1)
    assert len(alone) == (7 + len(KINDS)) * len(infos) / 2
    assert outcome(2) == alone
    assert outcome(4) == alone


def special_word(dtype: str, value: float) -> int:
    """A bit pattern that is NaN, or the infinity ``value``."""
    if dtype in SMALL:
        found = np.flatnonzero(np.isnan(table(dtype)) if math.isnan(value) else table(dtype) == value)
        return int(found[-1 if math.copysign(1, value) < 0 else 0])
    return int(np.array(value, f"f{DTYPES[dtype].itemsize}").view(DTYPES[dtype].carrier))


NOT_FINITE = [
    (dtype, value)
    for dtype in ALL
    for value in (math.nan, -math.nan, math.inf, -math.inf)
    if math.isnan(value) or DEFINITIONS[dtype][3] == "ieee"
]


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_one_element_that_is_not_finite_marks_its_neuron(dtype, value, sides):
    word = special_word(dtype, value)
    assert decoded(dtype, word) == value or math.isnan(decoded(dtype, word)) == math.isnan(value)
    a, b = of_all_sorts(dtype, 40, 50)
    a[21] = b[21]  # unchanged, but for what follows
    hit = [0, 3, 21, 22, 39]
    for place, row in enumerate(hit):
        column = (0, 49, 25, 7, 49)[place]
        if sides != "tuned":
            a[row, column] = word
        if sides != "base":
            b[row, column] = word
    clean = np.setdiff1d(np.arange(40), hit)
    expected = reference(decode(dtype, a[clean]), decode(dtype, b[clean]), (a != b)[clean])
    for piece in (CUT_SIZES.piece, 128):
        for axes, transpose in (((0,), False), ((1,), True)):
            tensors = (a.T, b.T) if transpose else (a, b)
            sums = compare(dtype, *tensors, axes, piece=piece).sums
            assert sums is not None
            np.testing.assert_array_equal(np.flatnonzero(~sums.finite), hit)
            found = {kind: sums.score(kind, 50) for kind in KINDS}
            for kind in KINDS:
                np.testing.assert_array_equal(np.flatnonzero(np.isnan(found[kind])), hit, err_msg=kind)
            assert_scores({kind: found[kind][clean] for kind in KINDS}, expected)
            np.testing.assert_array_equal(sums.changed, (a != b).sum(1))


# What has no neurons is summed over the whole tensor.


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("piece", [CUT_SIZES.piece, 256])
def test_whole_tensors(dtype, piece):
    a, b = of_all_sorts(dtype, 40, 50)
    for scale in (None, *SCALES[dtype]):
        if scale is not None:
            if not 1e-100 < scale < 1e100:
                continue  # whose squares float64 cannot say
            a, b = (
                encode(dtype, side * scale) for side in np.random.default_rng(1).standard_normal((2, 40, 50))
            )
        x, y = decode(dtype, a), decode(dtype, b)
        result = compare(dtype, a, b, None, piece=piece)
        assert result.sums is None
        assert result.base_sq == pytest.approx((x * x).sum(), rel=1e-5, abs=0), scale
        assert result.delta_sq == pytest.approx(((y - x) ** 2).sum(), rel=1e-5, abs=0), scale
        assert result.changed == (a != b).sum()


@pytest.mark.parametrize("dtype", ALL)
def test_whole_tensors_leave_out_what_is_not_finite(dtype):
    a, b = of_all_sorts(dtype, 20, 30)
    a[3, 4] = b[5, 6] = a[7, 8] = b[7, 8] = special_word(dtype, math.nan)
    if dtype in ("F16", "BF16", "F32", "F64", "F8_E5M2"):
        a[9, 1] = b[9, 1] = b[10, 2] = special_word(dtype, -math.inf)
    x, y = decode(dtype, a), decode(dtype, b)
    good = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(good, x, 0), np.where(good, y, 0)
    result = compare(dtype, a, b, None)
    assert result.base_sq == pytest.approx((x * x).sum(), rel=1e-5, abs=0)
    assert result.delta_sq == pytest.approx(((y - x) ** 2).sum(), rel=1e-5, abs=0)
    assert result.changed == (a != b).sum()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("BOOL", "?"),
        ("U8", "u1"),
        ("I8", "i1"),
        ("I16", "i2"),
        ("U16", "u2"),
        ("I32", "i4"),
        ("U32", "u4"),
        ("I64", "i8"),
        ("U64", "u8"),
        ("C64", "c8"),
    ],
)
def test_whole_tensors_of_other_numbers(dtype, kind):
    rng = np.random.default_rng(9)
    a, b = (rng.integers(0, 2, (30, 7)) if kind == "?" else rng.integers(0, 120, (30, 7)) for _ in "ab")
    a, b = a.astype(kind), np.where(rng.random((30, 7)) < 0.5, a, b).astype(kind)
    if kind == "c8":
        a += 1j * rng.standard_normal((30, 7)).astype(np.float32)
        b[0, 0], b[1, 1] = complex(math.nan, 1), complex(0, math.inf)
    with np.errstate(invalid="ignore"):
        x, d = a.astype(np.complex128), b.astype(np.complex128) - a
    good = np.isfinite(d)
    result = compare(dtype, a, b, None, piece=128)
    assert result.base_sq == pytest.approx((np.abs(x) ** 2).sum(), rel=1e-12, abs=0)
    assert result.delta_sq == pytest.approx((np.abs(d[good]) ** 2).sum(), rel=1e-12, abs=0)
    assert result.changed == (a != b).sum()
    assert result.delta_sq > 0


def test_packed_codes_only_count():
    """F4 puts two elements in a byte, F6 four in three bytes."""
    rng = np.random.default_rng(3)
    for dtype, bits in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E8M0", 8)):
        elements = 16 * 24
        a = rng.integers(0, 256, elements * bits // 8, np.uint8)
        b = np.where(rng.random(a.size) < 0.8, a, a ^ rng.integers(1, 256, a.size, np.uint8))
        info = TensorInfo("t", dtype, (16, 24))
        (result,) = stream(
            Memory({"t": (info, a.tobytes())}),
            Memory({"t": (info, b.tobytes())}),
            [Job(info, None)],
            limits=Limits.of(),
        )
        words = [
            [
                int.from_bytes(side.tobytes(), "little") >> bits * element & (1 << bits) - 1
                for element in range(elements)
            ]
            for side in (a, b)
        ]
        assert (result.base_sq, result.delta_sq) == (0, 0)
        assert result.changed == sum(x != y for x, y in zip(*words, strict=True)) > 0


def test_empty_tensors_have_no_result_and_progress_tells_all_bytes():
    infos = [TensorInfo("a", "F32", (3, 0)), TensorInfo("b", "I8", (5, 5)), TensorInfo("c", "BF16", (6, 9))]
    infos += [TensorInfo("d", "F32", (0,)), TensorInfo("e", "F64", ())]
    weights = Memory({info.name: (info, bytes(info.nbytes)) for info in infos})
    jobs = [Job(info, Layout(info.shape, (0,)) if info.name == "c" else None) for info in infos]
    told: list[int] = []
    results = list(stream(weights, weights, jobs, limits=Limits.of(), progress=told.append))
    assert [job.info.name for result in results for job in result.jobs] == ["b", "c", "e"]
    assert sum(told) == 2 * (25 + 6 * 9 * 2 + 8)


def test_a_failure_to_read_is_passed_on():
    class Broken(Memory):
        def read_into(self, name: str, start: int, buffer: memoryview) -> None:
            raise OSError(5, "Input/output error")

    info = TensorInfo("t", "F32", (10, 10))
    good = Memory({"t": (info, bytes(400))})
    for threads in (1, 4):
        with pytest.raises(OSError, match="Input/output"):
            jobs = [Job(info, Layout((10, 10), (0,)))]
            list(stream(good, Broken({"t": (info, b"")}), jobs, limits=Limits.of(threads)))
