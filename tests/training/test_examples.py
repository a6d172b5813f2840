"""Examples of rows: which tokens are learned, and what is said of rows that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_support import tokenizer

import neftsurgery as ns
from neftsurgery.training.examples import Encoder, collate, read_rows
from neftsurgery.training.form import Form

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def rows(tmp_path: Path, *contents: Any, form: Form | None = None) -> Any:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in contents))
    return read_rows(str(path), "train", form=form)


def learned(tmp_path: Path, row: Any, **options: Any) -> tuple[str, str]:
    """All of an example's text, and what is learned of it."""
    letters = tokenizer()
    letters.chat_template = CHAT
    encoder = Encoder(letters, **({"loss_on": "completions", "max_length": 100} | options))
    (example,) = encoder.encode(rows(tmp_path, row))
    ids, labels = example["input_ids"], example["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return letters.decode(ids), letters.decode([label for label in labels if label >= 0])


def test_the_completion_is_learned(tmp_path: Path) -> None:
    row = {"prompt": "copy ab:", "completion": " ab"}
    assert learned(tmp_path, row) == ("copy ab: ab</s>", " ab</s>")
    assert learned(tmp_path, row, loss_on="all") == ("copy ab: ab</s>",) * 2
    assert learned(tmp_path, row, max_length=10) == ("copy ab: a", " a")
    assert learned(tmp_path, {"text": "ab"}) == ("ab</s>", "ab</s>")


def test_answers_are_learned(tmp_path: Path) -> None:
    talk = [("user", "x"), ("assistant", "yes"), ("user", "z"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    assert learned(tmp_path, row) == ("u:x.a:yes.u:z.a:no.", "yes.no.")


def test_a_batch_is_padded(tmp_path: Path) -> None:
    short = {"input_ids": [5, 6], "labels": [-100, 6]}
    batch = collate([short, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, 8, 9]]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ([1], "an example is an object"),
        ({"prompt": "a"}, "two texts"),
        ({"prompt": "a", "completion": ""}, "empty"),
        ({"question": "a", "answer": "b"}, "found question, answer"),
        ({"messages": "hello"}, "role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "from the assistant"),
        ({"text": 3}, "a text"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, bad: Any, why: str) -> None:
    with pytest.raises(ns.CorruptFileError, match=rf"line 3: .*{why}"):
        rows(tmp_path, GOOD, "", bad)


def test_a_form_makes_texts_of_any_fields(tmp_path: Path) -> None:
    form = Form.of("{{{lines[1]}}} {q} is", " {translation[en]}")
    fields = {"q": 3, "translation": {"en": "b{q}"}, "lines": ["x", "y"], "prompt": "unread"}
    (row,) = rows(tmp_path, fields, form=form)
    assert row.content == {"prompt": "{y} 3 is", "completion": " b{q}"}
    for bad in ({"q": 3}, {**fields, "translation": ["en"]}, {**fields, "q": None}, {**fields, "q": [1]}):
        with pytest.raises(ns.CorruptFileError, match="line 2: there is no text in the field"):
            rows(tmp_path, fields, bad, form=form)


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("{a}", None, "go together"),
        (None, "{a}", "go together"),
        ("{a", "{b}", "not a form"),
        ("{a}", "b", "names no field"),
        ("{}", "{b}", "no name"),
        ("{a.__class__}", "{b}", "no name"),
        ("{a!r}", "{b}", "no name"),
        ("{a:>1000000000}", "{b}", "no name"),
    ],
)
def test_texts_that_are_no_form(prompt: str | None, completion: str | None, why: str) -> None:
    with pytest.raises(ns.UsageError, match=why):
        Form.of(prompt, completion)
    assert Form.of(None, None) is None


def test_files_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ns.UsageError, match="no such file"):
        read_rows(str(tmp_path / "no.jsonl"), "train")
    with pytest.raises(ns.UsageError, match="no examples"):
        rows(tmp_path, "")
    letters = tokenizer()
    letters.chat_template = None
    encoder = Encoder(letters, loss_on="completions", max_length=3)
    with pytest.raises(ns.UsageError, match="no example has a token to learn"):
        encoder.encode(rows(tmp_path, {"prompt": "abcd", "completion": "e"}))
    with pytest.raises(ns.UsageError, match="no chat template"):
        encoder.encode(rows(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]}))
