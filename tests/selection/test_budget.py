from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neftsurgery.cli.console import flag
from neftsurgery.errors import UsageError
from neftsurgery.selection.budget import Amount, Budget


@pytest.mark.parametrize(
    ("text", "percent", "canonical"),
    [
        ("3%", Fraction(3), "3%"),
        (" 3 % ", Fraction(3), "3%"),
        ("0.5%", Fraction(1, 2), "0.5%"),
        (".5%", Fraction(1, 2), "0.5%"),
        ("007.10%", Fraction(71, 10), "7.1%"),
        ("100%", Fraction(100), "100%"),
        ("100.000%", Fraction(100), "100%"),
        ("0.0000001%", Fraction(1, 10**7), "0.0000001%"),
    ],
)
def test_percentages(text: str, percent: Fraction, canonical: str) -> None:
    amount = Amount.parse(text)
    assert (amount.percent, amount.count) == (percent, None)
    assert str(amount) == canonical
    assert amount.describe() == canonical


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (50000, 50000),
        ("1", 1),
        ("50000", 50000),
        ("50_000", 50000),
        ("50,000", 50000),
        ("1,234,567", 1234567),
        ("2K", 2000),
        ("2k", 2000),
        ("200M", 200_000_000),
        ("200 m", 200_000_000),
        ("1.5M", 1_500_000),
        ("0.25K", 250),
        ("2B", 2_000_000_000),
        ("2G", 2_000_000_000),
    ],
)
def test_numbers(text: str | int, count: int) -> None:
    amount = Amount.parse(text)
    assert (amount.percent, amount.count) == (None, count)
    assert str(amount) == str(count)
    assert amount.describe() == count


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "%", "K", "nan", "inf", "1e5", "3%%", "3%K", "3 percent", "0x10", "٣%", "三", "1T"],
        *["0", 0, -1, "-1", "-3%", "0%", "0.0%", "100.1%", "101%", "50000.0", "1.0001K"],
        *["1,50", "1,0000", ",100", "1__0", "_1", "1_", "0,5%", "9" * 5000, "0." + "0" * 5000 + "1%"],
        *[True, None, 0.03, 50000.0, float("nan"), [3]],
    ],
)
def test_nonsense_is_refused_with_a_hint(text: Any) -> None:
    with pytest.raises(UsageError) as caught:
        Amount.parse(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["0.03", ".03", 0.03])
def test_a_fraction_is_refused_with_the_percentage_it_may_mean(text: Any) -> None:
    with pytest.raises(UsageError, match="for a share write 3%"):
        Amount.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"percent": Fraction(3), "count": 3},
        {"percent": Fraction(1, 3)},
        {"percent": Fraction(0)},
        {"percent": Fraction(101)},
        {"count": 0},
    ],
)
def test_an_amount_cannot_be_made_wrong(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Amount(**fields)


percents = st.integers(1, 10**9).map(lambda n: Amount(percent=Fraction(n, 10**7)))
counts = st.integers(1, 10**15).map(lambda n: Amount(count=n))
amounts = st.one_of(percents, counts)


@settings(deadline=None)
@given(amounts)
def test_the_text_of_an_amount_reads_back(amount: Amount) -> None:
    assert Amount.parse(str(amount)) == amount
    assert Amount.parse(amount.describe()) == amount


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["--neurons", "--params", "--threshold", "--changed", "--like"]),
        ({"neurons": "3%", "params": "3%"}, ["--neurons", "--params"]),
        ({"threshold": 0.0, "changed": True}, ["--threshold", "--changed"]),
        ({"neurons": 3, "like": {}}, ["--neurons", "--like"]),
        ({"threshold": 1.0, "policy": "reversed"}, ["--threshold", "--policy reversed"]),
        ({"changed": True, "policy": "random"}, ["--changed", "--policy random"]),
        ({"changed": True, "per": "layer"}, ["--changed", "--per layer"]),
        ({"like": {"a": 1}, "per": "tensor"}, ["--like", "--per tensor"]),
        ({"changed": True, "max_per_tensor": 3}, ["--changed", "--max-per-tensor"]),
        ({"like": {"a": 1}, "max_per_tensor": 3}, ["--like", "--max-per-tensor"]),
        ({"like": {"a": -1}}, ["--like", "tensor a"]),
        ({"like": {"a": 1.5}}, ["--like"]),
        ({"threshold": float("nan")}, ["--threshold"]),
        ({"threshold": float("inf")}, ["--threshold"]),
        ({"threshold": "much"}, ["--threshold"]),
        ({"threshold": 10**400}, ["--threshold"]),
        ({"neurons": "3%", "max_per_tensor": 0}, ["--max-per-tensor"]),
        ({"neurons": "3%", "max_per_tensor": 1.5}, ["--max-per-tensor"]),
        ({"neurons": "3%", "seed": -1}, ["--seed"]),
        ({"neurons": "3%", "seed": None}, ["--seed"]),
        ({"neurons": "3%", "per": "head"}, ["--per", "head"]),
        ({"neurons": "3%", "allocate": "equal"}, ["--allocate equal", "--per model"]),
        ({"threshold": 1.0, "per": "layer", "allocate": "scores"}, ["--allocate scores", "--threshold"]),
        ({"neurons": "3%", "per": "layer", "allocate": "fair"}, ["--allocate", "fair"]),
        ({"neurons": "3%", "policy": "best"}, ["--policy", "best"]),
        ({"neurons": 0.03}, ["--neurons", "3%"]),
        ({"params": "lots"}, ["--params", "lots"]),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_options_names(
    options: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.of(**options)
    on_the_command_line, in_python = caught.value.text(flag), str(caught.value)
    for name in named:
        assert name in on_the_command_line
        assert (name.removeprefix("--").partition(" ")[0].replace("-", "_")) in in_python
    assert "--" not in in_python
    assert "[[" not in in_python + on_the_command_line


def test_the_class_itself_checks_too() -> None:
    with pytest.raises(UsageError, match=r"^neurons and changed"):
        Budget(neurons=Amount(count=1), changed=True)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"neurons": "3%", "per": "tensor", "max_per_tensor": 2, "policy": "random", "seed": 4}, "neurons"),
        ({"params": "200M", "per": "layer", "policy": "reversed"}, "params"),
        ({"threshold": 0, "max_per_tensor": 1, "per": "layer"}, "threshold"),
        ({"changed": True, "with_bias": True}, "changed"),
        ({"like": {"b": 0, "a": 2}, "policy": "random"}, "like"),
        ({"like": {}}, "like"),
    ],
)
def test_what_goes_together(options: dict[str, Any], option: str) -> None:
    assert next(iter(Budget.of(**options).describe())) == option


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"neurons": "3%", "per": "tensor"}, "--per tensor"),
        ({"neurons": "3%", "max_per_tensor": 3}, "--max-per-tensor"),
        ({"like": {"a": 1}}, "--like"),
    ],
)
def test_units_have_no_tensors(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match="does not go with anatomy='units'") as caught:
        Budget.of(**options).check_units()
    assert caught.value.text(flag).startswith(f"{named} does not go with --anatomy units")


@pytest.mark.parametrize("options", [{"neurons": "3%", "per": "layer"}, {"params": 9}, {"changed": True}])
def test_units_go_with_the_rest(options: dict[str, Any]) -> None:
    Budget.of(**options).check_units()


def test_a_description_holds_only_what_is_set() -> None:
    assert Budget.of(neurons="3.0%").describe() == {"neurons": "3%"}
    assert Budget.of(params="2K", with_bias=True).describe() == {"params": 2000, "with_bias": True}
    assert Budget.of(changed=True).describe() == {"changed": True}
    random = Budget.of(like={"a": 2}, policy="random")
    assert random.describe() == {"like": {"a": 2}, "policy": "random", "seed": 0}


def test_a_budget_keeps_its_own_counts() -> None:
    like = {"a": 1}
    budget = Budget.of(like=like)
    like["a"] = 2
    assert budget.like == {"a": 1}


@settings(deadline=None)
@given(
    size=st.one_of(
        st.builds(lambda a: {"neurons": a}, amounts),
        st.builds(lambda a: {"params": a}, amounts),
        st.builds(lambda n: {"like": n}, st.dictionaries(st.text(), st.integers(0, 10**6), max_size=3)),
        st.builds(lambda x: {"threshold": x}, st.floats(allow_nan=False, allow_infinity=False)),
        st.just({"changed": True}),
    ),
    rest=st.fixed_dictionaries(
        {},
        optional={
            "per": st.sampled_from(["model", "layer", "tensor"]),
            "max_per_tensor": st.integers(1, 10**6),
            "policy": st.sampled_from(["sensitive", "reversed", "random"]),
            "seed": st.integers(0, 2**70),
            "with_bias": st.booleans(),
        },
    ),
)
def test_a_description_makes_the_same_budget_again_after_a_trip_through_json(
    size: dict[str, Any], rest: dict[str, Any]
) -> None:
    if "threshold" in size or "changed" in size:
        rest.pop("policy", None)
    if "like" in size or "changed" in size:
        rest.pop("per", None)
        rest.pop("max_per_tensor", None)
    budget = Budget.of(**size, **rest)
    assert Budget.of(**json.loads(json.dumps(budget.describe(), allow_nan=False))) == budget
