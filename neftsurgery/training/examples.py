"""Training examples: rows of a jsonl file or a Hub dataset, as tokens with the loss where it belongs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import CorruptFileError, MachineError, MismatchError, UsageError
from ..sources.resolve import is_hub_id
from .form import Form

__all__ = ["Encoder", "Example", "Row", "collate", "read_rows"]

IGNORED = -100
"""The label of a token without loss, by torch's custom."""

Example: TypeAlias = dict[str, list[int]]
"""``input_ids``, and ``labels`` of the same length: the token, or `IGNORED`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, checked: what kind it is and where it stands.

    Attributes
    ----------
    file, number:
        Where: the line of the file, or the row of the data set, from 1.
    content:
        Its object.
    kind:
        ``prompt``, ``messages`` or ``text``.
    """

    file: str
    number: int
    content: Mapping[str, Any]
    kind: str

    def error(self, why: str) -> CorruptFileError:
        """That something about this row is wrong."""
        return CorruptFileError(f"line {self.number}: {why}", file=self.file)


def read_rows(
    named: str, split: str, *, subset: str | None = None, form: Form | None = None, limit: int | None = None
) -> list[Row]:
    """The rows of a jsonl file, or of a data set of the Hub.

    Parameters
    ----------
    split, subset:
        Of a data set of the Hub.
    form:
        Makes prompt and completion of a row's fields.
    limit:
        The most rows to read.

    Raises
    ------
    UsageError
        If there is no such file, or it holds nothing.
    CorruptFileError
        For a line that is no object, or none of the known kinds: with its number.
    MachineError
        If the Hub cannot be reached.
    """
    lines = _hub_rows(named, subset, split) if is_hub_id(named) else _lines(Path(named))
    rows = []
    for number, content in lines:
        rows.append(_checked(named, number, content, form))
        if len(rows) == limit:
            break
    if not rows:
        raise UsageError("there are no examples in it", file=named)
    return rows


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UsageError(
            "there is no such file of examples", file=path, hint="name a .jsonl file, or a Hub dataset"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise CorruptFileError(f"line {number}: not valid JSON: {error}", file=path) from error


def _hub_rows(named: str, subset: str | None, split: str) -> Iterator[tuple[int, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            "a data set of the Hub needs datasets", file=named, hint="pip install datasets"
        ) from error
    repo, _, revision = named.partition("@")
    try:
        rows = load_dataset(repo, subset, split=split, revision=revision or None)
    except ValueError as error:  # no such split, or several configurations
        raise UsageError(f"the data set cannot be used: {_first_line(error)}", file=named) from error
    except Exception as error:  # the client's own, and those of several libraries under it
        raise MachineError(
            f"the data set cannot be fetched: {type(error).__name__}: {_first_line(error)}",
            file=named,
            hint="check the spelling and the network, or name a .jsonl file",
        ) from error
    yield from enumerate(rows, 1)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _checked(named: str, number: int, content: Any, form: Form | None) -> Row:
    if not isinstance(content, dict):
        raise CorruptFileError(
            f"line {number}: an example is an object", file=named, found=type(content).__name__
        )
    if form is not None:
        try:
            content = form.fill(content)
        except LookupError as error:
            raise CorruptFileError(
                f"line {number}: there is no text in the field {{{error.args[0]}}} of the recipe's form",
                file=named,
                found=_keys(content),
            ) from error
    kind = next((kind for kind in ("prompt", "messages", "text") if content.get(kind) is not None), "")
    row = Row(named, number, content, kind)
    if kind == "prompt" and not all(isinstance(content.get(key), str) for key in ("prompt", "completion")):
        raise row.error("prompt and completion are two texts")
    if kind == "prompt" and not content["completion"]:
        raise row.error("the completion is empty")
    if kind == "messages":
        _check_messages(row)
    if kind == "text" and not isinstance(content["text"], str):
        raise row.error("text is a text")
    if not kind:
        raise CorruptFileError(
            f"line {number}: expected prompt and completion, or messages, or text; found {_keys(content)}",
            file=named,
            hint="data.prompt and data.completion of a recipe make them of other fields",
        )
    return row


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(content)[:5])) or "no keys"


def _check_messages(row: Row) -> None:
    messages = row.content["messages"]
    good = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not good:
        raise row.error("messages is a list of objects with role and content")
    if not any(one["role"] == "assistant" for one in messages):
        raise row.error("no message is from the assistant")


class Encoder:
    """Makes examples of rows.

    Attributes
    ----------
    cut:
        How many examples were longer than ``max_length``.
    dropped:
        How many had no token to learn left then.
    """

    def __init__(self, tokenizer: Any, *, loss_on: str, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._all = loss_on == "all"
        self._max_length = max_length
        self.cut = 0
        self.dropped = 0

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of ``rows``.

        Raises
        ------
        UsageError
            If the tokenizer lacks what they need, or nothing is left to learn.
        """
        made = {"prompt": self._completion, "messages": self._chat, "text": self._text}
        examples = []
        for row in rows:
            ids, learned = made[row.kind](row)
            labels = [
                token if self._all or keep else IGNORED for token, keep in zip(ids, learned, strict=True)
            ]
            self.cut += len(ids) > self._max_length
            ids, labels = ids[: self._max_length], labels[: self._max_length]
            if any(label != IGNORED for label in labels[1:]):  # nothing predicts the first
                examples.append({"input_ids": ids, "labels": labels})
            else:
                self.dropped += 1
        if not examples:
            raise UsageError(
                "no example has a token to learn", file=rows[0].file, hint="data.max_length may be too small"
            )
        return examples

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def _text(self, row: Row) -> tuple[list[int], list[bool]]:
        ids = self._ended(self._ids(row.content["text"]))
        return ids, [True] * len(ids)

    def _completion(self, row: Row) -> tuple[list[int], list[bool]]:
        prompt, completion = row.content["prompt"], row.content["completion"]
        # Together, as they will be read; a token that lies across the border belongs to the completion.
        ids = self._ended(self._ids(prompt + completion))
        known = _common(self._ids(prompt), ids)
        return ids, [n >= known for n in range(len(ids))]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _chat(self, row: Row) -> tuple[list[int], list[bool]]:
        if not self._tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template, which messages need",
                file=row.file,
                hint="write prompt and completion instead",
            )
        messages = row.content["messages"]
        ids = self._template(row, messages)
        learned = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and not self._all:
                before = self._template(row, messages[:number], add_generation_prompt=True)
                after = self._template(row, messages[: number + 1])
                if _common(after, ids) < len(after) - 1:
                    raise MismatchError(
                        f"line {row.number}: the chat template rewrites earlier answers",
                        file=row.file,
                        hint="set data.loss_on: all, or keep one answer to an example",
                    )
                start, stop = _common(before, ids), min(len(after), len(ids))
                learned[start:stop] = [True] * (stop - start)
        return ids, learned

    def _template(self, row: Row, messages: Sequence[Any], **options: Any) -> list[int]:
        from jinja2 import TemplateError

        if not messages:
            return []
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise row.error(
                f"the chat template does not take these messages: {_first_line(error)}"
            ) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How long they are equal."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(some), len(others)))


def collate(examples: Sequence[Example], padding: int) -> dict[str, Tensor]:
    """A batch of ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[examples, longest]``."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows: Iterator[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded((e["input_ids"] for e in examples), padding),
        "attention_mask": padded(([1] * len(e["input_ids"]) for e in examples), 0),
        "labels": padded((e["labels"] for e in examples), IGNORED),
    }
