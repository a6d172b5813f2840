"""How the selection suite reads text and searches for learning rates, without torch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.selection.arms import ARMS, CONTROL_SIZES
from benchmarks.selection.rate_search import best_exponent, next_exponent
from benchmarks.selection.text import Sizes, TextError, read, read_plays, short, split

SIZES = Sizes(train=30, dev=10, test=10, words=6, characters=8)


def normalized(sentence: str) -> str:
    """The sentence without case and punctuation: equal for sentences that a reader would call the same."""
    return re.sub(r"\W", "", sentence).lower()


def test_no_sentence_is_in_two_parts_on_either_side():
    # Chains: pair n shares its English with n+1 and its Chinese with n+2, but not case and punctuation.
    pairs = [(f"Say {n // 2}{'!?'[n % 2]}", f"说{n // 3}{'。…、'[n % 3]}") for n in range(12)]
    pairs += [(f"word {n}.", f"字{n}。") for n in range(100, 200)]
    parts = split(pairs, SIZES, seed=0)
    assert {part: len(found) for part, found in parts.items() if part != "pretrain"} == {
        "test": 10, "dev": 10, "train": 30,
    }  # fmt: skip
    for side in (0, 1):
        seen = [{normalized(pair[side]) for pair in part} for part in parts.values()]
        for number, part in enumerate(seen):
            assert not part & set().union(*seen[number + 1 :])
    for part in ("test", "dev"):
        assert len({normalized(english) for english, _ in parts[part]}) == 10


def test_the_split_depends_on_the_seed_and_too_few_pairs_are_an_error():
    pairs = [(f"word {n}", f"字{n}") for n in range(80)]
    assert split(pairs, SIZES, 0) == split(pairs, SIZES, 0) != split(pairs, SIZES, 1)
    with pytest.raises(TextError, match="50 are needed"):
        split(pairs[:50], SIZES, 0)


def test_only_short_pairs_are_kept_without_duplicates():
    kept = ("I am here.", "我在。")
    pairs = [kept, kept, ("a b c d e f g", "我"), ("I am", "我在这里我在这里我")]
    assert short(pairs, SIZES) == [kept]


def test_a_folder_without_text_is_an_error_that_says_what_it_needs(tmp_path):
    with pytest.raises(TextError, match=r"cmn\.txt; --text must name a folder"):
        read(tmp_path, SIZES)


def test_speeches_of_plays(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("Romeo:\nIs love\na tender thing?\n\n\n\nNurse:\nMadam!\n")
    assert read_plays(tmp_path) == ("romeo: is love a tender thing?", "nurse: madam!")
    with pytest.raises(TextError, match=r"for the plays tinyshakespeare\.txt"):
        read_plays(tmp_path / "nowhere")


def test_the_real_text_is_split(shared_data):
    text = read(shared_data / "text", SIZES)
    assert (len(text.train), len(text.dev), len(text.test)) == (30, 10, 10)
    assert len(text.pretrain) > 1000
    assert (
        text.digest == read(shared_data / "text", SIZES).digest != read(shared_data / "text", SIZES, 1).digest
    )
    assert not any(paragraph.startswith("=") for paragraph in text.articles)


def searched(
    losses: Callable[[int], float], start: int = 2, lowest: int = -4, highest: int = 8
) -> dict[int, float]:
    tried: dict[int, float] = {}
    while (exponent := next_exponent(tried, start, lowest, highest)) is not None:
        assert exponent not in tried
        tried[exponent] = losses(exponent)
    return tried


@given(st.integers(-4, 8))
def test_the_search_ends_at_the_bottom_of_a_valley_with_both_sides_tried(bottom):
    tried = searched(lambda exponent: abs(exponent - bottom))
    assert best_exponent(tried) == bottom
    assert {bottom - 1, bottom + 1} & set(range(-4, 9)) <= tried.keys()
    assert len(tried) <= abs(bottom - 2) + 3


def test_nan_is_never_the_best():
    assert best_exponent(searched(lambda exponent: float("nan") if exponent > 1 else -exponent)) == 1
    assert list(searched(lambda exponent: 1.0)) == [
        2,
        3,
        1,
        0,
        -1,
        -2,
        -3,
        -4,
    ]  # all equal: the lowest exponent wins


def test_every_size_with_controls_has_the_same_ones_and_is_compared_with_random():
    controls = [
        {name.removesuffix(f"-{p}") for name, arm in ARMS.items() if arm.percent == p} for p in CONTROL_SIZES
    ]
    assert controls[0] == controls[1] >= {"neft", "random", "random-like", "least-like", "norm", "reversed"}
    for name, arm in ARMS.items():
        assert arm.name == name
        assert arm.random_control is None or (
            arm.percent in CONTROL_SIZES and ARMS[arm.random_control].policy == "random"
        )
    assert {ARMS[f"{name}-3"].anatomy for name in ("neft", "ffn", "units")} == {"rows", "ffn", "units"}
