"""How neurons were chosen, as a value: everything is kept, and nonsense reads as unknown."""

from __future__ import annotations

import json

import pytest

from neftsurgery import Selection
from neftsurgery.selection.selection import SelectionFacts

RAW = {
    "score": "cosine", "policy": "random", "budget": {"neurons": "3%"}, "anatomy": "rows", "seed": 5,
    "captured": 0.5, "captured_scored": 0.75, "followers": ["b", "a", 3], "unheard_of": [{"a": None}],
    "base": {"name": "base", "fingerprint": "f"}, "tuned": {"repo": "org/tuned"},
}  # fmt: skip


def test_what_it_reads() -> None:
    facts = SelectionFacts.from_json(RAW)
    assert (facts.score, facts.anatomy, facts.policy) == ("cosine", "rows", "random")
    assert facts.budget == {"neurons": "3%"}
    assert (facts.captured, facts.captured_scored) == (0.5, 0.75)
    assert facts.companion_biases == {"a", "b"}
    assert (facts.base.fingerprint, facts.tuned.label) == ("f", "org/tuned")
    assert json.dumps(facts.to_json()) == json.dumps(RAW)


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, [[], 3], {"name": []}, True, float("nan")])
def test_nonsense_reads_as_unknown(value: object) -> None:
    facts = SelectionFacts(dict.fromkeys(RAW, value))
    shown = value if isinstance(value, str) else None
    assert (facts.score, facts.anatomy, facts.policy) == (shown, shown, shown)
    assert facts.captured == (5 if value == 5 else None)
    assert facts.companion_biases == frozenset()
    assert facts.budget == facts.base == facts.tuned == (value if isinstance(value, dict) else {})
    assert facts.base.label is None
    str(Selection({}, facts))


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_patch_records(captured: bool) -> None:
    left_out = {"base", "tuned"} if captured else {"base", "tuned", "captured", "captured_scored"}
    found = SelectionFacts(RAW).for_patch(captured=captured)
    assert found == {key: value for key, value in RAW.items() if key not in left_out}


def test_a_selection_takes_any_mapping() -> None:
    for facts in (RAW, SelectionFacts(RAW)):
        assert Selection({}, facts).facts.to_json() == RAW
