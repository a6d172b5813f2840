"""Scores from sums: the exact ones, which sums are doubted, and the joining of vectors into units."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import KINDS, LARGEST, Values, assert_scores, compare, fine_tuned, reference
from test_kernels import ALL, Bits, decode, encode

from neftsurgery.scoring.sums import SCORES, Sums, UnitSums, exact, random_scores


def raw(dtype: str, values: object) -> np.ndarray:
    """Values to rows of bytes."""
    return np.ascontiguousarray(encode(dtype, values)).view(np.uint8)


@pytest.mark.parametrize("dtype", ALL)
def test_exact(dtype):
    x, y = fine_tuned(np.random.default_rng(0), 20, 301, 0.3, 0.9)
    found = exact(dtype, raw(dtype, x), raw(dtype, y))
    x, y = (decode(dtype, encode(dtype, side)) for side in (x, y))
    d = y - x
    r = d - ((x * d).sum(1) / (x * x).sum(1))[:, None] * x
    sums = {"aa": x * x, "dd": d * d, "ad": x * d, "bb": y * y, "ab": x * y, "rr": r * r}
    for name, products in sums.items():
        np.testing.assert_allclose(getattr(found, name), products.sum(1), rtol=1e-11, err_msg=name)
    assert (found.scale == 1).all()
    assert found.finite.all()
    np.testing.assert_array_equal(found.changed, (x != y).sum(1))


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e-75, 1e75, 1e200, 1e306])
def test_exact_scales_what_would_leave_the_range(size):
    x, y = fine_tuned(np.random.default_rng(0), 3, 50, 0.3, 0.5)
    x[1], y[1] = x[1] * size, y[1] * size
    found = exact("F64", raw("F64", x), raw("F64", y))
    assert (found.scale[[0, 2]] == 1).all()
    assert found.scale[1] != 1
    assert np.frexp(found.scale[1])[0] == 0.5  # a power of two
    u, v = (side[1].astype(np.longdouble) * found.scale[1] for side in (x, y))
    for mine, theirs in ((found.aa, u * u), (found.dd, (v - u) ** 2), (found.ab, u * v), (found.bb, v * v)):
        assert 0 < mine[1] < np.inf
        assert mine[1] == pytest.approx(float(theirs.sum()), rel=1e-9)
    np.testing.assert_array_equal(found.changed, (x != y).sum(1))


def test_a_nan_beside_huge_elements_is_seen():
    x = np.array([[1e200, np.nan], [1e-200, np.inf], [1e200, 1.0]])
    found = exact("F64", x.view(np.uint8), x[::-1].copy().view(np.uint8))
    np.testing.assert_array_equal(found.finite, [False, False, False])
    found = exact("F64", x.view(np.uint8), x.view(np.uint8))
    np.testing.assert_array_equal(found.finite, [False, False, True])


def sums_of(aa: float, dd: float, ad: float, changed: int = 1) -> Sums:
    return Sums(np.array([[aa], [dd], [ad]]), np.array([changed]))


@pytest.mark.parametrize(
    ("aa", "dd", "ad", "changed", "doubted"),
    [
        (1.0, 1e-6, 0.0, 1, False),  # at a right angle
        (1.0, 1e-6, 0.86e-3, 1, False),
        (1.0, 1e-6, 0.87e-3, 1, True),  # too near to parallel: 1 - .87**2 is below .25
        (1.0, 1e-6, -0.87e-3, 1, True),
        (1.0, 0.0, 0.0, 0, False),  # unchanged
        (1.0, 0.0, 0.0, 1, True),  # changed by too little for float32
        (0.0, 1.0, 0.0, 1, True),
        (0.0, 0.0, 0.0, 0, True),
        (1e-31, 1e-31, 0.0, 1, True),
        (1e38, 1.0, 0.0, 1, True),
        (1.0, 1e38, 0.0, 1, True),
        (np.nan, np.nan, np.nan, 1, True),
        (np.nan, 0.0, np.nan, 0, True),
        (np.inf, 1.0, 0.0, 1, True),
        (np.inf, 0.0, 0.0, 0, True),
        (1.0, np.inf, np.nan, 1, True),
    ],
)
def test_doubt(aa, dd, ad, changed, doubted):
    sums = sums_of(aa, dd, ad, changed)
    assert sums.doubtful("BF16").tolist() == [0] * doubted
    if 0 < aa < 1e38 and np.isfinite(dd) and dd not in (1e38, 1e-31):
        assert sums.doubtful("F64").tolist() == [0] * doubted


def test_sums_of_f64_are_trusted_far_from_one():
    for size in (1e-60, 1e60, 1e-31, 1e38):
        assert sums_of(size, size, 0.0).doubtful("F64").tolist() == []
    for size in (1e-141, 1e141):
        assert sums_of(size, size, 0.0).doubtful("F64").tolist() == [0]


def test_scores_of_plain_sums():
    """a = (2, 0), b = (2, 1.5) and a = (2, 0), b = (-2, 1.5), as sums."""
    sums = Sums(np.array([[4.0, 4.0], [2.25, 18.25], [0.0, -8.0]]), np.array([1, 2]))
    np.testing.assert_allclose(sums.score("cosine", 2), [1 - 0.8, 1 + 0.8], rtol=1e-6)
    np.testing.assert_allclose(sums.score("l2", 2), [1.5, np.sqrt(18.25)], rtol=1e-6)
    np.testing.assert_allclose(sums.score("relative", 2), [0.75, np.sqrt(18.25) / 2], rtol=1e-6)
    np.testing.assert_allclose(sums.score("changed", 2), [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(sums.score("norm", 2), [0.5, 0.5], rtol=1e-6)
    bb, ab, rr = sums.parts()
    np.testing.assert_allclose(bb, [6.25, 6.25])
    np.testing.assert_allclose(ab, [4, -4])
    np.testing.assert_allclose(rr, [2.25, 2.25])
    with pytest.raises(ValueError, match="unknown score 'random'"):
        sums.score("random", 2)
    assert set(SCORES) == {*KINDS, "random", "lowrank"}


def test_scores_of_largest_sums_are_finite():
    """What float32 cannot hold becomes its largest number, for a NaN or an infinity would say more."""
    sums = Sums(np.array([[1e-80, 1e80], [1e80, 1e80], [0, 0]]), np.array([1, 1]))
    np.testing.assert_array_equal(sums.score("l2", 1), np.float32([LARGEST, LARGEST]))
    np.testing.assert_array_equal(sums.score("relative", 1), np.float32([LARGEST, 1]))
    np.testing.assert_allclose(sums.score("norm", 1), np.float32([LARGEST, 1e-40]), rtol=1e-4)


def test_refined_values_count():
    x, y = fine_tuned(np.random.default_rng(1), 4, 40, 1e-3, 1)
    x[2, 7] = np.inf
    a, b = encode("F32", x), encode("F32", y)
    a[2, 7] = np.array(np.inf, np.float32).view(np.uint32)
    values = np.full((3, 4), 5.0)
    sums = Sums(values, np.zeros(4, np.int64))
    index = np.array([1, 2])
    sums.refine(index, exact("F32", a[index].view(np.uint8), b[index].view(np.uint8)))
    np.testing.assert_array_equal(sums.finite, [True, True, False, True])
    assert np.isnan([sums.aa[2], sums.dd[2], sums.ad[2]]).all()
    assert (sums.aa[[0, 3]] == 5).all()
    expected = reference(decode("F32", a[1:2]), decode("F32", b[1:2]), (a != b)[1:2])
    found = {kind: sums.score(kind, 40) for kind in KINDS}
    assert_scores({kind: found[kind][1:2] for kind in KINDS}, expected)
    assert all(np.isnan(found[kind][2]) for kind in KINDS)


def test_joined_sums_score_as_their_parts():
    """To the bit, with vectors of several widths, and with refined and infinite ones."""
    rng = np.random.default_rng(2)
    parts, widths = [], [40, 7, 300]
    for width in widths:
        x, y = fine_tuned(rng, 9, width, 1e-3, 0.99)  # so near to parallel that they are refined
        x[2], y[3], y[5] = 0, x[3], np.nan
        parts.append(compare("F32", encode("F32", x), encode("F32", y), (0,)).sums)
    whole = Sums.joined(parts)
    for kind in KINDS:
        found = whole.score(kind, np.repeat(widths, 9))
        expected = [part.score(kind, width) for part, width in zip(parts, widths, strict=True)]
        np.testing.assert_array_equal(found, np.concatenate(expected), strict=True)
    for which in ("aa", "dd", "ad", "changed", "finite"):
        expected = np.concatenate([getattr(part, which) for part in parts])
        np.testing.assert_array_equal(getattr(whole, which), expected, strict=True)
    assert np.isnan(whole.aa[[5, 14, 23]]).all()
    for mine, theirs in zip(whole.parts(), zip(*(part.parts() for part in parts), strict=True), strict=True):
        np.testing.assert_array_equal(mine, np.concatenate(theirs))


# Units: concatenated vectors.


def joined(dtype: str, parts: list[tuple[Values, Values]]) -> tuple[UnitSums, Bits, Bits]:
    """Unit sums of row i of every part, and the concatenated rows."""
    units = UnitSums(len(parts[0][0]))
    bits = [(encode(dtype, x), encode(dtype, y)) for x, y in parts]
    for a, b in bits:
        sums = compare(dtype, a, b, (0,)).sums
        assert sums is not None
        units.add(np.arange(len(a)), sums, a.shape[1])
    return units, np.concatenate([a for a, _ in bits], axis=1), np.concatenate([b for _, b in bits], axis=1)


def check_units(dtype: str, parts: list[tuple[Values, Values]]) -> None:
    units, a, b = joined(dtype, parts)
    found = {kind: units.score(kind) for kind in KINDS}
    assert_scores(found, reference(decode(dtype, a), decode(dtype, b), a != b))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("share", [0, 0.9, 0.99, 0.9999, 1])
def test_units_are_the_concatenated_vectors(dtype, change, share):
    """Also where every part moved along itself, by the same ratio or by ratios of their own."""
    rng = np.random.default_rng(7)
    sizes = (1, 0.1, 30)
    own = [fine_tuned(rng, 30, width, change, share) for width in (33, 1, 64)]
    check_units(dtype, [(s * x, s * y) for s, (x, y) in zip(sizes, own, strict=True)])
    x, y = fine_tuned(rng, 30, 120, change, share)
    cuts = [slice(0, 50), slice(50, 53), slice(53, 120)]
    check_units(dtype, [(x[:, cut], y[:, cut]) for cut in cuts])
    decayed = [x * (1 - change) + change * 1e-2 * rng.standard_normal(x.shape) for x, _ in own]
    check_units(dtype, [(x, z) for (x, _), z in zip(own, decayed, strict=True)])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_units_with_large_changes_and_zeros(dtype):
    rng = np.random.default_rng(8)
    one, two = rng.standard_normal((2, 12, 40))
    kinds = [0 * one, one, -one, 2 * one, 1e-3 * one, -one + 1e-2 * two, two, 1.5 * one]
    for first, second, third in itertools.product(kinds, kinds[:4], (one, 0 * one)):
        check_units(dtype, [(one, first), (third, second)])


@pytest.mark.parametrize("scale", [1e-24, 1e-15, 3e19])
def test_units_far_from_one(scale):
    rng = np.random.default_rng(9)
    parts = [fine_tuned(rng, 20, 40, 1e-2, share) for share in (0, 0.9999, 1)]
    check_units("F32", [(scale * x, scale * y) for x, y in parts])
    check_units("F32", [(x, y) if number else (scale * x, scale * y) for number, (x, y) in enumerate(parts)])


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    change=st.integers(-6, 1),
    share=st.sampled_from([0.0, 0.9, 0.9999, 1.0]),
    same=st.booleans(),
    scales=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e4]), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_any_cut_of_a_vector_gives_its_scores(widths, change, share, same, scales, seed):
    rng = np.random.default_rng(seed)
    if same:  # one vector, cut up
        x, y = fine_tuned(rng, 4, sum(widths), 10.0**change, share)
        edges = np.cumsum(widths)[:-1]
        parts = list(zip(np.split(x, edges, axis=1), np.split(y, edges, axis=1), strict=True))
    else:
        parts = [fine_tuned(rng, 4, width, 10.0**change, share) for width in widths]
    check_units("F32", [(s * x, s * y) for s, (x, y) in zip(scales, parts, strict=False)])


def test_many_neurons_of_a_tensor_in_one_unit_and_some_in_none():
    """As the query heads that share a key head; -1 is no unit, and unit 3 has no members."""
    rng = np.random.default_rng(10)
    x, y = fine_tuned(rng, 12, 25, 1e-3, 0.99)
    owners = np.array([0, 0, 1, 1, 2, 2, -1, -1, 0, 4, 4, 2])
    a, b = encode("F32", x), encode("F32", y)
    sums = compare("F32", a, b, (0,)).sums
    assert sums is not None
    units = UnitSums(5)
    units.add(owners, sums, 25)
    for unit in (0, 1, 2, 4):
        members = np.flatnonzero(owners == unit)
        assert units.width[unit] == 25 * len(members)
        u, v = (decode("F32", side[members].reshape(1, -1)) for side in (a, b))
        found = {kind: units.score(kind)[unit : unit + 1] for kind in KINDS}
        assert_scores(found, reference(u, v, u != v))
    assert units.width[3] == 0
    assert all(np.isnan(units.score(kind)[3]) for kind in KINDS)


def test_a_unit_with_a_member_that_is_not_finite_has_no_score():
    rng = np.random.default_rng(11)
    units, _, _ = joined("F32", [fine_tuned(rng, 3, 20, 0.1, 0.5) for _ in "ab"])
    before = units.score("cosine")
    assert np.isfinite(before).all()
    x, y = fine_tuned(rng, 3, 5, 0.1, 0.5)
    a, b = encode("F32", x), encode("F32", y)
    b[1, 2] = np.array(np.nan, np.float32).view(np.uint32)
    sums = compare("F32", a, b, (0,)).sums
    assert sums is not None
    units.add(np.arange(3), sums, 5)
    for kind in KINDS:
        np.testing.assert_array_equal(np.isnan(units.score(kind)), [False, True, False])


# The control.


def test_random_scores():
    scores = random_scores("model.layers.0.mlp.up_proj.weight", 20_000, 3)
    assert scores.dtype == np.float32
    assert scores.shape == (20_000,)
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    share = np.histogram(scores, bins=20, range=(0, 1))[0] / 20_000
    np.testing.assert_allclose(share, 0.05, atol=0.01)
    np.testing.assert_array_equal(random_scores("model.layers.0.mlp.up_proj.weight", 20_000, 3), scores)
    for layer, seed in ((1, 3), (0, 4)):
        other = random_scores(f"model.layers.{layer}.mlp.up_proj.weight", 20_000, seed)
        assert abs(np.corrcoef(scores, other)[0, 1]) < 0.04
    assert random_scores("", 0, 0).shape == (0,)
    assert not (random_scores("\ud800", 5, 2**70) == random_scores("\ud801", 5, 2**70)).any()
