"""Prompt templates: texts with fields in braces, which make prompt and completion from a row of data."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

__all__ = ["PromptTemplate"]

_FORMATTER = string.Formatter()


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt and completion with fields of a row in braces, as in ``Question: {question}``.

    ``{translation[en]}`` is the entry ``en`` of the field ``translation``. ``{{`` is a literal brace.
    """

    prompt: str
    completion: str

    @classmethod
    def of(cls, prompt: str | None, completion: str | None) -> PromptTemplate | None:
        """The checked template of a recipe; None if it has none.

        Raises UsageError if one of the two texts is missing, or one is not a template.
        """
        if prompt is None and completion is None:
            return None
        if prompt is None or completion is None:
            raise UsageError("data.prompt and data.completion go together", hint="give both, or neither")
        for key, text in (("prompt", prompt), ("completion", completion)):
            _check(f"data.{key}", text)
        return cls(prompt, completion)

    def fill(self, row: Mapping[str, Any]) -> dict[str, str]:
        """``prompt`` and ``completion`` of a row.

        Raises LookupError if the row lacks a field. The argument is the field's name.
        """
        return {"prompt": _filled(self.prompt, row), "completion": _filled(self.completion, row)}


def _check(key: str, text: str) -> None:
    try:
        fields = [part[1:] for part in _FORMATTER.parse(text) if part[1] is not None]
    except ValueError as error:
        raise UsageError(
            f"{key} is not a prompt template: {error}", hint="write {{ for a literal brace"
        ) from error
    for name, spec, conversion in fields:
        if not name or name[0] in "[." or "." in name or spec or conversion:
            raise UsageError(
                f"{key} has a field that is not a name: {{{name}}}",
                hint="a field is {name} or {name[key]}; write {{ for a literal brace",
            )
    if not fields:
        raise UsageError(f"{key} has no field", found=repr(text), hint="as in 'Question: {question}'")


def _filled(text: str, row: Mapping[str, Any]) -> str:
    parts = []
    for literal, name, _, _ in _FORMATTER.parse(text):
        parts.append(literal)
        if name is not None:
            parts.append(_field(name, row))
    return "".join(parts)


def _field(name: str, row: Mapping[str, Any]) -> str:
    try:
        value, _ = _FORMATTER.get_field(name, (), row)
    except (LookupError, TypeError, ValueError) as error:
        raise LookupError(name) from error
    if isinstance(value, str | int | float):
        return str(value)
    raise LookupError(name)
