"""Against an oracle that sorts everything in plain Python, in exact arithmetic."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neftsurgery.errors import MismatchError, UsageError
from neftsurgery.selection.budget import Amount, Budget
from neftsurgery.selection.choice import Block, choose

Chosen = set[tuple[int, int]]
Place = tuple[int, int]
Layout = list[tuple[str, int, list[float]]]


def vector(*scores: float) -> NDArray[np.float32]:
    return np.array(scores, np.float32)


def block(*scores: float, tensor: str = "a", layer: str = "", cost: int = 1) -> Block:
    return Block(tensor, layer, cost, vector(*scores))


def places(masks: Sequence[NDArray[np.bool_]]) -> Chosen:
    return {(number, int(index)) for number, mask in enumerate(masks) for index in np.flatnonzero(mask)}


def chosen(blocks: Sequence[Block], parameters: int = 1000, **options: Any) -> Chosen:
    """What is chosen, whichever way it is searched for."""
    budget = Budget.of(**options)
    found = under("sorted", blocks, budget, parameters)
    assert under("cut", blocks, budget, parameters) == found
    return found


def under(search: str, blocks: Sequence[Block], budget: Budget, parameters: int) -> Chosen:
    return places(masks_under(search, blocks, budget, parameters))


def masks_under(
    search: str, blocks: Sequence[Block], budget: Budget, parameters: int
) -> list[NDArray[np.bool_]]:
    """``"sorted"`` sorts every pool; ``"cut"`` sorts none, and its chunks and batches end inside blocks."""
    pool, chunk = (1000, 1000) if search == "sorted" else (0, 3)
    return choose(blocks, budget, parameters=parameters, chunk=chunk, sorted_pool=pool)


# The oracle.


def oracle_order(blocks: Sequence[Block], policy: str) -> list[Place]:
    sign = -1 if policy == "sensitive" else 1
    found = [
        (sign * float(score), number, index)
        for number, b in enumerate(blocks)
        for index, score in enumerate(b.scores)
        if not math.isnan(score)
    ]
    return [(number, index) for _, number, index in sorted(found)]


def oracle_split(amount: int, sizes: dict[str, int]) -> dict[str, int]:
    exact = {pool: Fraction(amount * size, sum(sizes.values())) for pool, size in sizes.items()}
    shares = {pool: math.floor(share) for pool, share in exact.items()}
    while sum(shares.values()) < amount:
        neediest = max(exact, key=lambda pool: exact[pool] - shares[pool])  # the first of equals
        shares[neediest] += 1
    return shares


def oracle(blocks: Sequence[Block], budget: Budget, parameters: int, order: list[Place]) -> Chosen:
    """``order``: the candidates, first choice first; pools are dicts in order of their first block."""

    def pool_of(place: Place) -> str:
        b = blocks[place[0]]
        by_tensor = budget.per == "tensor" or budget.like is not None
        return b.tensor if by_tensor else b.layer if budget.per == "layer" else "all"

    def cost_of(place: Place) -> int:
        return blocks[place[0]].cost if budget.params else 1

    sizes = {pool_of((number, 0)): 0 for number in range(len(blocks))}
    for place in order:
        sizes[pool_of(place)] += cost_of(place)
    amount = budget.neurons or budget.params or Amount(count=1)
    if budget.like is not None:
        limits = {pool: budget.like.get(pool, 0) for pool in sizes}
    elif budget.neurons and amount.percent:
        shares = {pool: amount.percent * size / 100 for pool, size in sizes.items()}
        halves_up = {pool: math.floor(share + Fraction(1, 2)) for pool, share in shares.items()}
        limits = {pool: max(halves_up[pool], 1 if size else 0) for pool, size in sizes.items()}
    else:
        number = math.floor(amount.percent * parameters / 100) if amount.percent else amount.count or 0
        limits = oracle_split(number, sizes)
    taken: Chosen = set()
    per_tensor: Counter[str] = Counter()
    closed = set()
    for place in order:
        b, pool = blocks[place[0]], pool_of(place)
        per_tensor[b.tensor] += 1
        if budget.max_per_tensor and per_tensor[b.tensor] > budget.max_per_tensor:
            continue
        if budget.threshold is not None:
            if float(b.scores[place[1]]) > budget.threshold:
                taken.add(place)
            continue
        if cost_of(place) > limits[pool]:
            closed.add(pool)
        if pool not in closed:
            limits[pool] -= cost_of(place)
            taken.add(place)
    return taken


special = [0.0, -0.0, 0.5, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38]


def layouts_of(values: st.SearchStrategy[float], size: int) -> st.SearchStrategy[Layout]:
    scores = st.lists(values, max_size=size)
    one = st.tuples(st.sampled_from("abcd"), st.sampled_from([1, 2, 3, 5, 20]), scores)
    return st.lists(one, min_size=1, max_size=6)


layouts = st.one_of(
    layouts_of(st.sampled_from([0.0, -0.0, 1.0]), 12),  # nearly all tied
    layouts_of(st.one_of(st.sampled_from(special), st.floats(width=32)), 7),
)
policies = st.sampled_from(["sensitive", "reversed"])
rests = st.fixed_dictionaries(
    {},
    optional={
        "per": st.sampled_from(["layer", "tensor"]),
        "max_per_tensor": st.integers(1, 6),
    },
)
percents = st.builds(lambda n: Amount(percent=Fraction(n, 10)), st.integers(1, 1000))
numbers = st.builds(lambda n: Amount(count=n), st.integers(1, 60))
amounts = st.one_of(percents, numbers)
sizes = st.one_of(
    st.builds(lambda a: {"neurons": a}, amounts),
    st.builds(lambda a: {"params": a}, amounts),
    st.builds(lambda x: {"threshold": x}, st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from([0.0, 0.5, 1.0, -1.0, 0.5 + 1e-9, 0.5 - 1e-9, 1e300, -1e300]).map(
        lambda x: {"threshold": x}
    ),
)
searches = st.sampled_from(["sorted", "cut"])


def made(layout: Layout) -> list[Block]:
    layer = {"a": "first", "b": "second", "c": "first", "d": ""}
    blocks = [Block(tensor, layer[tensor], cost, vector(*scores)) for tensor, cost, scores in layout]
    return sorted(blocks, key=lambda b: b.tensor)


def agree(blocks: Sequence[Block], budget: Budget, order: list[Place], search: str, parameters: int) -> None:
    if not order:
        with pytest.raises(MismatchError):
            under(search, blocks, budget, parameters)
        return
    expected = oracle(blocks, budget, parameters, order)
    if budget.params and not expected:
        with pytest.raises(UsageError, match="too small for a single neuron"):
            under(search, blocks, budget, parameters)
        return
    assert under(search, blocks, budget, parameters) == expected


@settings(max_examples=1500, deadline=None)
@given(layouts, sizes, policies, rests, searches, st.integers(1, 200))
def test_as_sorting_everything_would(
    layout: Layout,
    size: dict[str, Any],
    policy: str,
    rest: dict[str, Any],
    search: str,
    parameters: int,
) -> None:
    blocks = made(layout)
    if "threshold" in size:
        policy = "sensitive"
    agree(blocks, Budget.of(**size, **rest, policy=policy), oracle_order(blocks, policy), search, parameters)


@settings(max_examples=300, deadline=None)
@given(layouts, sizes.filter(lambda s: "threshold" not in s), rests, searches, st.integers(0, 99))
def test_random_is_one_hidden_order_under_every_budget(
    layout: Layout,
    size: dict[str, Any],
    rest: dict[str, Any],
    search: str,
    seed: int,
) -> None:
    blocks = made(layout)
    order: list[Place] = []
    for count in range(1, len(oracle_order(blocks, "sensitive")) + 1):
        grown = under(search, blocks, Budget.of(neurons=count, policy="random", seed=seed), 0)
        (added,) = grown - set(order)
        order.append(added)
    agree(blocks, Budget.of(**size, **rest, policy="random", seed=seed), order, search, 100)


@settings(max_examples=300, deadline=None)
@given(layouts, policies, searches, st.data())
def test_like_takes_the_same_counts_in_order(
    layout: Layout, policy: str, search: str, data: st.DataObject
) -> None:
    blocks = made(layout)
    order = oracle_order(blocks, policy)
    room = Counter(blocks[number].tensor for number, _ in order)
    like = {tensor: data.draw(st.integers(0, room[tensor])) for tensor in {b.tensor for b in blocks}}
    agree(blocks, Budget.of(like=like, policy=policy), order, search, 0)
    if order:
        control = under(search, blocks, Budget.of(like=like, policy="random", seed=3), 0)
        assert Counter(blocks[number].tensor for number, _ in control) == +Counter(like)


# Laws.


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40, unique=True), searches, st.data()
)
def test_the_most_and_the_least_sensitive_part_the_candidates(
    scores: list[float], search: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(scores)))
    blocks = [block(*scores[:cut]), block(*scores[cut:])]
    count = data.draw(st.integers(1, len(scores) - 1))
    most = under(search, blocks, Budget.of(neurons=count), 0)
    least = under(search, blocks, Budget.of(neurons=len(scores) - count, policy="reversed"), 0)
    assert not most & least
    assert len(most | least) == len(scores)


@settings(max_examples=200, deadline=None)
@given(layouts, sizes, st.sampled_from(["sensitive", "reversed", "random"]), rests, searches)
def test_where_blocks_are_cut_changes_nothing(
    layout: Layout,
    size: dict[str, Any],
    policy: str,
    rest: dict[str, Any],
    search: str,
) -> None:
    blocks = made(layout)
    budget = Budget.of(**size, **rest, policy="sensitive" if "threshold" in size else policy)
    pieces = [replace(b, scores=b.scores[i : i + 2]) for b in blocks for i in range(0, len(b.scores), 2)]
    before = [b.scores.tobytes() for b in blocks]
    try:
        expected = choose(blocks, budget, parameters=150)
    except (MismatchError, UsageError) as error:
        with pytest.raises(type(error)):
            under(search, pieces, budget, 150)
    else:
        found = masks_under(search, pieces, budget, 150)
        assert np.concatenate(found).tolist() == np.concatenate(expected).tolist()
    assert [b.scores.tobytes() for b in blocks] == before


def test_scores_decide_wherever_the_neurons_lie() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permutation(100_000).astype(np.float32)
    moved = rng.permutation(len(scores))
    (straight,) = choose([Block("a", "", 2, scores)], Budget.of(neurons="3%"), parameters=0)
    (shuffled,) = choose([Block("a", "", 2, scores[moved])], Budget.of(neurons="3%"), parameters=0)
    assert np.array_equal(straight[moved], shuffled)
    assert np.array_equal(straight, scores >= 97_000)


def test_random_takes_every_neuron_equally_often() -> None:
    blocks = [block(5, 4, math.nan, 3), block(2, 1, 0, tensor="b")]
    draws = 3000
    taken = Counter(
        place for seed in range(draws) for place in chosen(blocks, neurons=2, policy="random", seed=seed)
    )
    assert len(taken) == 6
    deviation = math.sqrt(draws * (1 / 3) * (2 / 3))
    assert all(abs(count - draws / 3) < 5 * deviation for count in taken.values())


def test_random_is_uniform_over_a_large_pool() -> None:
    blocks = [Block("a", "", 1, np.zeros(2_000_000, np.float32))]
    (mask,) = choose(blocks, Budget.of(neurons="50%", policy="random"), parameters=0)
    assert mask.sum() == 1_000_000
    tenths = mask.reshape(10, -1).sum(axis=1)
    assert abs(tenths - 100_000).max() < 5 * math.sqrt(200_000 / 4)
    assert abs(int((mask[1:] & mask[:-1]).sum()) - 500_000) < 5 * math.sqrt(2_000_000 / 4)


# Examples by hand.


def test_percentages_round_to_the_nearest_and_to_one_at_least() -> None:
    eight = [block(8, 7, 6, 5, 4, 3, 2, 1)]
    assert len(chosen(eight, neurons="0.001%")) == 1
    assert len(chosen(eight, neurons="18.7%")) == 1
    assert len(chosen(eight, neurons="18.75%")) == 2  # 1.5
    assert len(chosen(eight, neurons="31.25%")) == 3  # 2.5: up, not to the even number
    assert len(chosen(eight, neurons="100%")) == 8


def test_each_pool_with_candidates_gets_at_least_one_of_a_percentage() -> None:
    blocks = [block(*range(100)), block(7, 9, tensor="b"), block(math.nan, tensor="c")]
    assert chosen(blocks, neurons="1%", per="tensor") == {(0, 99), (1, 1)}
    assert chosen(blocks, neurons="1%") == {(0, 99)}


def test_a_number_is_split_by_largest_remainder_and_equal_ones_go_to_the_earlier() -> None:
    blocks = [block(1, 2, 3), block(1, 2, 3, tensor="b"), block(1, 2, 3, tensor="c")]
    assert chosen(blocks, neurons=4, per="tensor") == {(0, 2), (0, 1), (1, 2), (2, 2)}
    assert chosen(blocks, neurons=1, per="tensor") == {(0, 2)}


@pytest.mark.parametrize(
    ("allocate", "budget", "expected"),
    [
        ("size", {"neurons": 10}, [1, 3, 6]),
        ("equal", {"neurons": 10}, [2, 4, 4]),  # the first pool has no more than two
        ("equal", {"neurons": "50%"}, [2, 4, 4]),
        ("equal", {"neurons": 99}, [2, 6, 12]),
        ("scores", {"neurons": 8}, [0, 6, 2]),  # six of the second hold three quarters
        ("scores", {"neurons": 10}, [0, 6, 4]),
        ("scores", {"neurons": 19}, [1, 6, 12]),  # without energy, only what the others cannot take
        ("equal", {"params": 15}, [2, 6, 7]),
        ("scores", {"params": 8}, [0, 6, 2]),
    ],
)
def test_a_budget_is_allocated_to_the_pools(
    allocate: str, budget: dict[str, Any], expected: list[int]
) -> None:
    sums = {"a": (2, 0.0), "b": (6, 6e-9), "c": (12, 2e-9)}  # of the scores of so many neurons
    rng = np.random.default_rng(0)
    blocks = []
    for name, (size, total) in sums.items():
        scores = rng.random(size)
        blocks.append(Block(name, name, 1, (scores / scores.sum() * total).astype(np.float32)))
    for per in ("tensor", "layer"):
        found = choose(blocks, Budget.of(per=per, allocate=allocate, **budget), parameters=100)
        assert [int(mask.sum()) for mask in found] == expected
        for block, mask in zip(blocks, found, strict=True):
            best = np.argsort(-np.asarray(block.scores[:]), kind="stable")[: int(mask.sum())]
            assert set(np.flatnonzero(mask).tolist()) == set(best.tolist())


def test_a_number_above_what_there_is_takes_all() -> None:
    assert chosen([block(1, math.nan), block(2, tensor="b")], neurons=5) == {(0, 0), (1, 0)}
    assert chosen([block(1, math.nan), block(2, tensor="b")], neurons=5, per="tensor") == {(0, 0), (1, 0)}


def test_parameters_stop_at_the_first_that_would_exceed() -> None:
    blocks = [block(9, 7, cost=10), block(8, 6, tensor="b", cost=3)]
    assert chosen(blocks, params=13) == {(0, 0), (1, 0)}
    assert chosen(blocks, params=22) == {(0, 0), (1, 0)}  # not (1, 1), though it would fit
    assert chosen(blocks, params=23) == {(0, 0), (1, 0), (0, 1)}
    assert chosen(blocks, parameters=1000, params="1.39%") == {(0, 0), (1, 0)}


def test_tied_parameters_stop_at_the_first_that_would_exceed() -> None:
    blocks = [block(1, cost=3), block(1, tensor="b", cost=10), block(1, tensor="c", cost=1)]
    assert chosen(blocks, params=5) == {(0, 0)}  # not (2, 0), though it would fit


def test_ties_under_a_cap_are_those_of_the_tensors_first() -> None:
    blocks = [block(1, 1, 1, 1), block(1, 1, 1, tensor="b"), block(2, tensor="c")]
    assert chosen(blocks, neurons=4, max_per_tensor=2) == {(0, 0), (0, 1), (1, 0), (2, 0)}
    blocks = [block(5, 4, 3, 2), block(1, 1, tensor="b")]
    assert chosen(blocks, neurons=3, max_per_tensor=2) == {(0, 0), (0, 1), (1, 0)}


def test_no_room_for_one_neuron_names_the_smallest() -> None:
    blocks = [block(2, cost=100), block(1, tensor="b", cost=40), block(math.nan, tensor="c", cost=5)]
    with pytest.raises(UsageError, match=r"params=30 .* 40 \(the smallest\) to 100 .* budget of 30"):
        chosen(blocks, params=30)
    with pytest.raises(UsageError, match="budget of 60"):
        chosen(blocks, params=60)  # the smallest would fit, but is not first
    with pytest.raises(UsageError, match="budget of 0"):
        chosen(blocks, params="0.01%")
    with pytest.raises(UsageError, match="budget of 110, split over 3 pools"):
        chosen(blocks, params=110, per="tensor")


def test_zeros_of_either_sign_are_equal() -> None:
    assert chosen([block(-0.0, 0.0, -1), block(0.0, -0.0)], neurons=2) == {(0, 0), (0, 1)}
    assert chosen([block(-0.0, 0.0, 1), block(0.0, -0.0)], neurons=2, policy="reversed") == {(0, 0), (0, 1)}


def test_infinities_are_ordinary_and_nan_is_never_chosen() -> None:
    blocks = [block(math.nan, math.inf, 3.4e38, -math.inf)]
    assert chosen(blocks, neurons=1) == {(0, 1)}
    assert chosen(blocks, neurons=1, policy="reversed") == {(0, 3)}
    assert chosen(blocks, neurons=4) == {(0, 1), (0, 2), (0, 3)}
    assert chosen([block(-math.inf, -math.inf, -math.inf)], neurons=2) == {(0, 0), (0, 1)}
    assert chosen([block(math.inf, math.inf, 1)], neurons=2, policy="reversed") == {(0, 0), (0, 2)}
    assert chosen([block(math.inf, math.inf)], neurons=1, policy="reversed") == {(0, 0)}
    assert chosen(blocks, threshold=3.39e38) == {(0, 1), (0, 2)}
    assert chosen(blocks, threshold=1e300) == {(0, 1)}


def test_the_threshold_is_not_rounded_to_float32() -> None:
    tenth = float(np.float32(0.1))  # a little above 0.1
    blocks = [block(tenth)]
    assert chosen(blocks, threshold=0.1) == {(0, 0)}
    assert chosen(blocks, threshold=tenth) == set()
    assert chosen(blocks, threshold=math.nextafter(tenth, 0)) == {(0, 0)}
    assert chosen(blocks, threshold=math.nextafter(tenth, 1)) == set()


def test_a_cap_keeps_the_best_of_each_tensor_and_does_not_change_the_amount() -> None:
    blocks = [block(9, 8, 7, 6), block(1, 2, tensor="b")]
    assert chosen(blocks, neurons=3, max_per_tensor=2) == {(0, 0), (0, 1), (1, 1)}
    assert chosen(blocks, neurons=5, max_per_tensor=2) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert chosen(blocks, neurons="50%", per="tensor", max_per_tensor=1) == {(0, 0), (1, 1)}
    assert chosen(blocks, threshold=1.5, max_per_tensor=2) == {(0, 0), (0, 1), (1, 1)}


def test_like_that_does_not_fit_is_refused() -> None:
    blocks = [block(1, math.nan), block(2, tensor="b")]
    with pytest.raises(UsageError, match="tensor c"):
        chosen(blocks, like={"c": 1})
    with pytest.raises(UsageError, match=r"tensor a.*expected 2, found 1"):
        chosen(blocks, like={"a": 2})
    assert chosen(blocks, like={}) == set()


@pytest.mark.parametrize("blocks", [[], [block()], [block(math.nan, math.nan)]])
@pytest.mark.parametrize("options", [{"neurons": "3%"}, {"threshold": 0.0}, {"like": {}}])
def test_nothing_to_choose_from(blocks: list[Block], options: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="no neuron can be scored"):
        chosen(blocks, **options)


def test_changed_is_not_a_matter_of_scores() -> None:
    with pytest.raises(ValueError, match="does not depend on scores"):
        chosen([block(1)], changed=True)


@pytest.mark.parametrize(
    ("scores", "cost"), [(np.zeros(3), 1), (np.zeros((3, 1), np.float32), 1), (np.zeros(3, np.float32), 0)]
)
def test_a_block_cannot_be_made_wrong(scores: Any, cost: int) -> None:
    with pytest.raises(ValueError, match="must"):
        Block("a", "", cost, scores)


# Size.


@pytest.mark.parametrize(
    ("options", "bytes_per_neuron"),
    [
        ({"neurons": "3%"}, 2),
        ({"params": "3%", "policy": "reversed"}, 2),
        ({"threshold": 1.0}, 2),
        ({"neurons": "3%", "per": "tensor", "max_per_tensor": 400_000}, 3),
        ({"neurons": "3%", "policy": "random"}, 6),
    ],
)
def test_memory_stays_within_a_few_bytes_a_neuron(options: dict[str, Any], bytes_per_neuron: int) -> None:
    rng = np.random.default_rng(0)
    blocks = [Block(f"{i}", "", 64, rng.standard_normal(1_000_000, np.float32)) for i in range(5)]
    tracemalloc.start()
    try:
        choose(blocks, Budget.of(**options), parameters=320_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < bytes_per_neuron * 5_000_000


@pytest.mark.parametrize("per", ["model", "layer", "tensor"])
def test_many_small_tensors_take_seconds(per: str) -> None:
    scores = np.random.default_rng(0).standard_normal((64_000, 16), np.float32)
    blocks = [Block(f"{i:05}", f"{i // 1000}", 8, row) for i, row in enumerate(scores)]
    start = time.perf_counter()
    masks = choose(blocks, Budget.of(neurons="25%", per=per), parameters=0)
    assert time.perf_counter() - start < 30  # about one; a round per pool and candidate would be minutes
    assert sum(int(mask.sum()) for mask in masks) == 256_000
