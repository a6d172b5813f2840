"""Rows of a data file: which are accepted, and what the errors say about the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
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
        ({"messages": [{"role": "assistant", "content": None}]}, "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "not text: image"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "not text: x"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "weight is 0 or 1, not 0.5"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "from the assistant"),
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


def test_messages_may_have_parts_and_tool_calls(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    (row,) = read(
        tmp_path, {"messages": [{"role": "user", "content": parts}, call, {**call, "content": None}]}
    )
    assert row.content["messages"] == [{"role": "user", "content": "ab"}, call, {**call, "content": None}]


def test_tables(tmp_path: Path) -> None:
    """A csv file holds texts alone, also where they look like numbers; lines are those of the file."""
    template = PromptTemplate.of("{q}:", "{a}")
    path = tmp_path / "data.csv"
    path.write_text('\ufeffq,a\n007,"x\ny"\nNA,1\n', "utf-8")
    rows = read_raw_examples(str(path), "train", template=template)
    assert [(row.line, *row.content.values()) for row in rows] == [(3, "007:", "x\ny"), (4, "NA:", "1")]
    with pytest.raises(ns.MismatchError, match=r"line 3: .*found q, a"):
        read_raw_examples(str(path), "train")
    for text, why in (
        ("q,a\n1,2\n1,2,3\n", "line 3: more fields"),
        ('q,a\n"1,2\n', "unexpected end"),
    ):
        path.write_text(text)
        with pytest.raises(ns.CorruptFileError, match=why):
            read_raw_examples(str(path), "train", template=template)
    path.write_bytes(b"q,a\n\xff,1\n")
    with pytest.raises(ns.CorruptFileError, match="can't decode"):
        read_raw_examples(str(path), "train", template=template)
    table = pyarrow.table({"q": [7, 8], "a": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    rows = read_raw_examples(str(tmp_path / "data.parquet"), "train", template=template)
    assert [(row.line, *row.content.values()) for row in rows] == [(1, "7:", "x"), (2, "8:", "y")]
    (tmp_path / "data.parquet").write_bytes(b"hello")
    with pytest.raises(ns.CorruptFileError, match="not a parquet file"):
        read_raw_examples(str(tmp_path / "data.parquet"), "train", template=template)
