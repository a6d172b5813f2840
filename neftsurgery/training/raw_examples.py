"""The checked rows of a file or a Hub dataset, and templates that make prompts from their fields."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError, MachineError, MismatchError, UsageError, naming
from ..sources.resolve import is_hub_id
from ..tensors.document import MAX_OBJECT_BYTES
from ..tensors.json_text import loads

#: The kinds of rows, each told by a key, and how messages call them.
_KINDS = {
    "preference": ("chosen", "prompt, chosen and rejected"), "prompt": ("prompt", "prompt and completion"),
    "messages": ("messages", "messages"), "text": ("text", "text"),
}  # fmt: skip
_ONE_PER_LINE = "a .jsonl file has one JSON object on each line"


@dataclass(frozen=True, slots=True)
class RawExample:
    """One checked row of a data set."""

    # The file and its line, or the data set and its row; the first is 1.
    file: str
    line: int
    content: Mapping[str, Any]  # the row's object
    kind: str  # one of `_KINDS`

    def error(self, what: str) -> MismatchError:
        """The error that this row cannot be learned from."""
        return _unfit(self.file, self.line, what)


def read_raw_examples(
    named: str,
    split: str,
    *,
    subset: str | None = None,
    template: PromptTemplate | None = None,
    limit: int | None = None,
    kinds: Sequence[str] = ("prompt", "messages", "text"),
) -> list[RawExample]:
    """Read at most ``limit`` rows of a file, or of the ``split`` of a Hub dataset's ``subset``.

    ``template`` makes prompt and completion from a row's fields; ``kinds`` are those that are expected.
    Errors name the line.
    """
    if is_hub_id(named):
        lines = _hub_rows(named, subset, split)
    elif not Path(named).is_file():
        hint = "name a .jsonl, .csv or .parquet file, or a Hub dataset"
        raise UsageError("there is no such file of examples", file=named, hint=hint)
    else:
        readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
        lines = readers.get(Path(named).suffix, _lines)(Path(named))
    examples = []
    for line, content in lines:
        examples.append(_checked(named, line, content, template, kinds))
        if len(examples) == limit:
            break
    if not examples:
        raise UsageError("there are no examples in it", file=named)
    return examples


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with naming(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_OBJECT_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_OBJECT_BYTES:
                    raise ValueError(f"larger than {MAX_OBJECT_BYTES:,} bytes")
                content = loads(line)
                if b"\\u" in line:
                    json.dumps(content, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:  # tokenizers take no such text
                what = f"line {number}: a text holds half of a surrogate pair"
                raise CorruptFileError(what, file=path) from error
            except ValueError as error:
                raise CorruptFileError(f"line {number}: {error}", file=path, hint=_ONE_PER_LINE) from error
            yield number, content


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a table with a header; every value is a text."""
    with naming(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise ValueError("more fields than the header")
                yield rows.line_num, row
        except (ValueError, csv.Error) as error:
            raise CorruptFileError(f"line {rows.line_num}: {error}", file=path) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    from datasets import Dataset

    try:
        yield from enumerate(Dataset.from_parquet(str(path), streaming=True), 1)
    except ValueError as error:
        raise CorruptFileError(f"not a parquet file: {first_line(error)}", file=path) from error


def _hub_rows(named: str, subset: str | None, split: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    repo, _, revision = named.partition("@")
    try:
        rows = load_dataset(repo, subset, split=split, revision=revision or None)
    except ValueError as error:  # an unknown split, or several configurations
        raise UsageError(f"the dataset cannot be used: {first_line(error)}", file=named) from error
    except Exception as error:  # errors of the Hub client, and of several libraries under it
        what = f"the dataset cannot be fetched: {type(error).__name__}: {first_line(error)}"
        hint = "check the spelling and the network, or name a .jsonl file"
        raise MachineError(what, file=named, hint=hint) from error
    yield from enumerate(rows, 1)


def _checked(
    named: str, line: int, content: Any, template: PromptTemplate | None, kinds: Sequence[str]
) -> RawExample:
    if not isinstance(content, dict):
        raise _unfit(named, line, "an example must be an object", found=type(content).__name__)
    if template is not None:
        try:
            content = template.fill(content)
        except LookupError as error:
            what = f"there is no text in the field {{{error.args[0]}}} of the prompt template"
            raise _unfit(named, line, what, found=_keys(content)) from error
    kind = next((kind for kind, (key, _) in _KINDS.items() if content.get(key) is not None), "")
    example = RawExample(named, line, content, kind)
    if kind not in kinds:
        hint = "data.prompt and data.completion of the recipe make these from other fields"
        if "preference" in (kind, *kinds):
            hint = "preferences are learned with train.method: dpo, and nothing else is"
        expected = ", or ".join(_KINDS[one][1] for one in kinds)
        raise _unfit(named, line, f"expected {expected}; found {_keys(content)}", hint=hint)
    if kind == "preference":
        _check_preference(example)
    if kind == "prompt" and not all(isinstance(content.get(key), str) for key in ("prompt", "completion")):
        raise example.error("prompt and completion must be two texts")
    if kind == "prompt" and not content["completion"]:
        raise example.error("the completion is empty")
    if kind == "messages":
        _check_messages(example)
    if kind == "text" and not isinstance(content["text"], str):
        raise example.error("text must be a text")
    return example


def _check_preference(example: RawExample) -> None:
    prompt, *answers = (example.content.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and all(isinstance(one, str) and one for one in answers):
        return
    for answer in answers:
        if not isinstance(answer, list) or not isinstance(prompt, list | None):
            raise example.error("prompt, chosen and rejected must be texts, or lists of messages")
        _check_messages(replace(example, content={"messages": [*(prompt or []), *answer]}))


def _unfit(file: str, line: int, what: str, **more: Any) -> MismatchError:
    return MismatchError(f"line {line}: {what}", file=file, **more)


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(content)[:5])) or "no keys"


def _check_messages(example: RawExample) -> None:
    messages = example.content["messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise example.error("messages must be a list of objects with role and content")
    for one in messages:
        content = "" if one.get("content") is None and one.get("tool_calls") else one.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise example.error(f"a message has a content part that is not text: {str(kind)[:40]}")
        if isinstance(content, list):
            one["content"] = "".join(part["text"] for part in content)
        elif not isinstance(content, str) or not isinstance(one.get("role"), str):
            raise example.error("messages must be a list of objects with role and content")
        if one.get("weight") not in (None, 0, 1):
            raise example.error(f"a message's weight is 0 or 1, not {str(one['weight'])[:40]}")
    if not any(one["role"] == "assistant" and one.get("weight") != 0 for one in messages):
        raise example.error("no message is from the assistant")


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt and completion with fields of a row in braces, as in ``Question: {question}``.

    ``{translation[en]}`` is the entry ``en`` of the field ``translation``. ``{{`` is a literal brace.
    """

    prompt: str
    completion: str

    @classmethod
    def of(cls, prompt: str | None, completion: str | None) -> PromptTemplate | None:
        """The checked template of a recipe; None if it has none, a `UsageError` if it is not one."""
        if prompt is None and completion is None:
            return None
        if prompt is None or completion is None:
            raise UsageError("data.prompt and data.completion go together", hint="give both, or neither")
        for key, text in (("prompt", prompt), ("completion", completion)):
            _check(f"data.{key}", text)
        return cls(prompt, completion)

    def fill(self, row: Mapping[str, Any]) -> dict[str, str]:
        """``prompt`` and ``completion`` of a row; a LookupError with the name of a missing field."""
        texts = {"prompt": self.prompt, "completion": self.completion}
        return {name: _FORMATTER.vformat(text, (), row) for name, text in texts.items()}


def _check(key: str, text: str) -> None:
    try:
        fields = [part[1:] for part in _FORMATTER.parse(text) if part[1] is not None]
    except ValueError as error:
        hint = "write {{ for a literal brace"
        raise UsageError(f"{key} is not a prompt template: {error}", hint=hint) from error
    for name, spec, conversion in fields:
        if not name or name[0] in "[." or "." in name or spec or conversion:
            hint = "a field is {name} or {name[key]}; write {{ for a literal brace"
            raise UsageError(f"{key} has a field that is not a name: {{{name}}}", hint=hint)
    if not fields:
        raise UsageError(f"{key} has no field", found=repr(text), hint="as in 'Question: {question}'")


class _Fields(string.Formatter):
    """Puts texts and numbers of a row into a template; a LookupError for anything else."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            value, used = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, ValueError) as error:
            raise LookupError(field_name) from error
        if isinstance(value, str | int | float):
            return str(value), used
        raise LookupError(field_name)


_FORMATTER = _Fields()
