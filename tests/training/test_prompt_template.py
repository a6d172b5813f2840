"""Prompt templates: which texts are templates, and what they make from a row."""

from __future__ import annotations

import pytest

import neftsurgery as ns
from neftsurgery.training.raw_examples import PromptTemplate


def test_a_template_makes_texts_of_any_fields() -> None:
    template = PromptTemplate.of("{{{lines[1]}}} {q} is", " {translation[en]}")
    assert template is not None
    row = {"q": 3, "translation": {"en": "b{q}"}, "lines": ["x", "y"], "prompt": "unread"}
    assert template.fill(row) == {"prompt": "{y} 3 is", "completion": " b{q}"}
    for bad in ({"q": 3}, {**row, "translation": ["en"]}, {**row, "q": None}, {**row, "q": [1]}):
        with pytest.raises(LookupError):
            template.fill(bad)


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("{a}", None, "go together"),
        (None, "{a}", "go together"),
        ("{a", "{b}", "data.prompt is not a prompt template"),
        ("{a}", "b", "data.completion has no field"),
        ("{}", "{b}", "not a name"),
        ("{a.__class__}", "{b}", "not a name"),
        ("{a!r}", "{b}", "not a name"),
        ("{a:>1000000000}", "{b}", "not a name"),
    ],
)
def test_texts_that_are_not_a_template(prompt: str | None, completion: str | None, why: str) -> None:
    with pytest.raises(ns.UsageError, match=why):
        PromptTemplate.of(prompt, completion)
    assert PromptTemplate.of(None, None) is None
