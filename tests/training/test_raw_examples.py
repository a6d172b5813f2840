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
    text = "".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in contents)
    path.write_text(text, "utf-8", "surrogateescape")
    return read_raw_examples(str(path), "train", **options)


def test_rows_know_their_line_and_kind(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "assistant", "content": "x"}]}
    rows = read(tmp_path, GOOD, "", talk, {"text": "t"})
    assert [(row.line, row.kind) for row in rows] == [(1, "prompt"), (3, "messages"), (4, "text")]
    assert len(read(tmp_path, GOOD, GOOD, GOOD, limit=2)) == 2


def test_a_byte_order_mark_and_characters_beyond_the_basic_plane(tmp_path: Path) -> None:
    rows = read(tmp_path, "\ufeff" + json.dumps({"text": "a"}), {"text": "\U0001f600"})
    assert [row.content["text"] for row in rows] == ["a", "\U0001f600"]


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


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("prompt,completion", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        ('{"text": "a", "weight": NaN}', "NaN is not a finite number"),
        ('{"text": "a \\ud83d"}', "half of a surrogate pair"),
        ('{"text": "\udc80"}', "byte 10 is not UTF-8"),
        ('{"text": "' + "a" * 10_000_000 + '"}', "larger than 10,000,000 bytes"),
        ('{"text": "a", "more": [' + "[]," * 1_000_000 + "0]}", "too large: its 2,000,00"),
    ],
)
def test_lines_that_are_not_json_are_damage(tmp_path: Path, bad: str, why: str) -> None:
    with pytest.raises(ns.CorruptFileError, match=rf"line 3: .*{why}"):
        read(tmp_path, GOOD, "", bad)


def test_what_a_jsonl_file_is_is_said(tmp_path: Path) -> None:
    with pytest.raises(ns.CorruptFileError, match="has one JSON object on each line"):
        read(tmp_path, "[")


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
