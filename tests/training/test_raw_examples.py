"""Rows of a data file: which are accepted, and what the errors say about the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import neftsurgery as ns
from neftsurgery.training.raw_examples import PromptTemplate, read_raw_examples

GOOD = {"prompt": "a", "completion": "b"}


def read(tmp_path: Path, *contents: Any, **options: Any) -> Any:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in contents))
    return read_raw_examples(str(path), "train", **options)


def test_rows_know_their_line_and_kind(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "assistant", "content": "x"}]}
    rows = read(tmp_path, GOOD, "", talk, {"text": "t"})
    assert [(row.line, row.kind) for row in rows] == [(1, "prompt"), (3, "messages"), (4, "text")]
    assert len(read(tmp_path, GOOD, GOOD, GOOD, limit=2)) == 2


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([1], "an example must be an object"),
        ({"prompt": "a"}, "two texts"),
        ({"prompt": "a", "completion": ""}, "empty"),
        ({"question": "a", "answer": "b"}, "found question, answer"),
        ({"messages": "hello"}, "role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "from the assistant"),
        ({"text": 3}, "a text"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, bad: Any, why: str) -> None:
    with pytest.raises(ns.MismatchError, match=rf"line 3: .*{why}"):
        read(tmp_path, GOOD, "", bad)


@pytest.mark.parametrize("bad", ['{"prompt": "a"', "[", "prompt,completion", "[" * 100_000, "\xff"])
def test_lines_that_are_not_json_are_damage(tmp_path: Path, bad: str) -> None:
    with pytest.raises(
        ns.CorruptFileError, match=r"line 3: not valid JSON(?s:.*)one JSON object on each line"
    ):
        read(tmp_path, GOOD, "", bad)


def test_a_template_makes_the_texts(tmp_path: Path) -> None:
    template = PromptTemplate.of("{{{lines[1]}}} {q} is", " {translation[en]}")
    fields = {"q": 3, "translation": {"en": "b{q}"}, "lines": ["x", "y"], "prompt": "unread"}
    (row,) = read(tmp_path, fields, template=template)
    assert row.content == {"prompt": "{y} 3 is", "completion": " b{q}"}
    for bad in ({"q": 3}, {**fields, "translation": ["en"]}, {**fields, "q": None}, {**fields, "q": [1]}):
        with pytest.raises(ns.MismatchError, match="line 2: there is no text in the field"):
            read(tmp_path, fields, bad, template=template)


def test_files_without_examples(tmp_path: Path) -> None:
    with pytest.raises(ns.UsageError, match="no such file"):
        read_raw_examples(str(tmp_path / "no.jsonl"), "train")
    with pytest.raises(ns.UsageError, match="no examples"):
        read(tmp_path, "")
