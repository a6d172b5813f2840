"""What the selection suite reads, and how it looks for learning rates: without torch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.selection.arms import ARMS, CONTROLLED
from benchmarks.selection.ladder import best_rung, next_rung
from benchmarks.selection.text import Sizes, TextError, deal, read, read_plays, short

SIZES = Sizes(train=30, dev=10, test=10, words=6, characters=8)


def heard(sentence: str) -> str:
    """What a reader would call the same sentence."""
    return re.sub(r"\W", "", sentence).lower()


def test_no_sentence_is_in_two_parts_on_either_side():
    # Chains: pair n shares its English with n+1 and its Chinese with n+2, with other case and punctuation.
    pairs = [(f"Say {n // 2}{'!?'[n % 2]}", f"说{n // 3}{'。…、'[n % 3]}") for n in range(12)]
    pairs += [(f"word {n}.", f"字{n}。") for n in range(100, 200)]
    dealt = deal(pairs, SIZES, seed=0)
    assert {part: len(found) for part, found in dealt.items() if part != "pretrain"} == {
        "test": 10, "dev": 10, "train": 30,
    }  # fmt: skip
    for side in (0, 1):
        seen = [{heard(pair[side]) for pair in part} for part in dealt.values()]
        for number, part in enumerate(seen):
            assert not part & set().union(*seen[number + 1 :])
    for part in ("test", "dev"):
        assert len({heard(english) for english, _ in dealt[part]}) == 10


def test_dealing_is_by_seed_and_short_of_pairs_it_says_so():
    pairs = [(f"word {n}", f"字{n}") for n in range(80)]
    assert deal(pairs, SIZES, 0) == deal(pairs, SIZES, 0) != deal(pairs, SIZES, 1)
    with pytest.raises(TextError, match="50 are asked for"):
        deal(pairs[:50], SIZES, 0)


def test_only_short_pairs_are_kept_each_once():
    kept = ("I am here.", "我在。")
    pairs = [kept, kept, ("a b c d e f g", "我"), ("I am", "我在这里我在这里我")]
    assert short(pairs, SIZES) == [kept]


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(TextError, match=r"cmn\.txt; --text names a folder"):
        read(tmp_path, SIZES)


def test_speeches_of_plays(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("Romeo:\nIs love\na tender thing?\n\n\n\nNurse:\nMadam!\n")
    assert read_plays(tmp_path) == ("romeo: is love a tender thing?", "nurse: madam!")
    with pytest.raises(TextError, match=r"for the plays tinyshakespeare\.txt"):
        read_plays(tmp_path / "nowhere")


def test_the_real_text_is_dealt_out(shared_data):
    text = read(shared_data / "text", SIZES)
    assert (len(text.train), len(text.dev), len(text.test)) == (30, 10, 10)
    assert len(text.pretrain) > 1000
    assert (
        text.digest == read(shared_data / "text", SIZES).digest != read(shared_data / "text", SIZES, 1).digest
    )
    assert not any(paragraph.startswith("=") for paragraph in text.articles)


def climbed(
    losses: Callable[[int], float], start: int = 2, lowest: int = -4, highest: int = 8
) -> dict[int, float]:
    tried: dict[int, float] = {}
    while (rung := next_rung(tried, start, lowest, highest)) is not None:
        assert rung not in tried
        tried[rung] = losses(rung)
    return tried


@given(st.integers(-4, 8))
def test_the_search_ends_at_the_bottom_of_a_valley_with_both_sides_tried(bottom):
    tried = climbed(lambda rung: abs(rung - bottom))
    assert best_rung(tried) == bottom
    assert {bottom - 1, bottom + 1} & set(range(-4, 9)) <= tried.keys()
    assert len(tried) <= abs(bottom - 2) + 3


def test_what_is_no_number_is_never_the_best():
    assert best_rung(climbed(lambda rung: float("nan") if rung > 1 else -rung)) == 1
    assert list(climbed(lambda rung: 1.0)) == [2, 3, 1, 0, -1, -2, -3, -4]  # level: the lowest of equals


def test_every_size_with_controls_has_the_same_ones_and_is_compared_with_random():
    controls = [
        {name.removesuffix(f"-{p}") for name, arm in ARMS.items() if arm.percent == p} for p in CONTROLLED
    ]
    assert controls[0] == controls[1] >= {"neft", "random", "random-like", "least-like", "norm", "reversed"}
    for name, arm in ARMS.items():
        assert arm.name == name
        assert arm.against is None or (arm.percent in CONTROLLED and ARMS[arm.against].policy == "random")
    assert {ARMS[f"{name}-3"].anatomy for name in ("neft", "ffn", "units")} == {"rows", "ffn", "units"}
