"""The JSON document that scores, selections and patches carry in a safetensors header, under one key.

It is an object with a ``version`` and the ``tensors`` that it describes. Here is what its readers share.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from ..errors import CorruptFileError, naming
from ..version import UPDATE
from .file_kinds import tensor_kind, what_helps
from .header import TensorInfo
from .json_text import loads
from .reader import TensorFile

#: Of a config: the largest real ones, with the names of 22,000 classes, have 2 MB.
MAX_OBJECT_BYTES = 10_000_000

Value = TypeVar("Value")


class Facts(Mapping[str, object]):
    """A JSON object of a file, which anyone may have written: a mapping with typed properties in subclasses.

    A property is None, or empty, where a value is missing or of another type. No key is lost.
    """

    __slots__ = ("_facts",)

    def __init__(self, facts: Mapping[str, object]) -> None:
        self._facts: Mapping[str, object] = facts._facts if isinstance(facts, Facts) else facts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_json()!r})"

    def __getitem__(self, key: str) -> object:
        return self._facts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The facts in a JSON value; none if it is not an object."""
        return cls(value if isinstance(value, Mapping) else {})

    def to_json(self) -> dict[str, object]:
        """The JSON object, with every key."""
        return dict(self._facts)

    def number(self, key: str) -> float | None:
        """The value of ``key`` if it is a finite number."""
        return as_number(self.get(key))


class Fact(Generic[Value]):
    """A property of `Facts`, or of an object with some in its attribute ``of``.

    It is what ``read`` makes of the value under the ``key``, by default the property's name, or of None.
    """

    def __init__(self, read: Callable[[object], Value], of: str = "", key: str = "") -> None:
        self._read, self._of, self._key = read, of, key

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = self._key or name

    def __get__(self, holder: Any, owner: type) -> Value:
        facts = getattr(holder, self._of) if self._of else holder
        return self._read(facts.get(self._key))


def as_text(value: object) -> str | None:
    """A value of a JSON object if it is a text."""
    return value if isinstance(value, str) else None


def as_number(value: object) -> float | None:
    """A value of a JSON object if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None


def dump(key: str, content: Mapping[str, object]) -> dict[str, str]:
    """The ``__metadata__`` that holds ``content`` under ``key``."""
    return {key: json.dumps(content, separators=(",", ":"), allow_nan=False)}


def read_object(path: Path, *, most: int = MAX_OBJECT_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``most`` bytes; a `CorruptFileError` if it is anything else."""
    content = read_value(path, most=most)
    if not isinstance(content, dict):
        raise CorruptFileError("not a JSON object", file=path)
    return content


def read_value(path: Path, *, most: int = MAX_OBJECT_BYTES) -> Any:
    """The JSON value in a file of at most ``most`` bytes; a `CorruptFileError` if there is none."""
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    with (
        naming(path),
        open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file,
    ):
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFileError("not a regular file", file=path)
        if status.st_size > most:
            raise CorruptFileError(f"the file is larger than {most:,} bytes", file=path)
        raw = file.read(status.st_size)
    try:
        return loads(raw)
    except ValueError as error:
        raise CorruptFileError(str(error), file=path) from error


def read_document(file: TensorFile, key: str, what: str, version: int) -> dict[str, Any]:
    """The JSON object under ``key``; ``what`` names the kind of file in messages.

    Raises a `CorruptFileError` if there is none, it is damaged, or its version is above ``version``.
    """
    text = file.header.metadata.get(key)
    if text is None:
        kind = tensor_kind(file.header.metadata, file.tensors)
        raise CorruptFileError(
            f"not a {what}: its header has no {key!r}",
            file=file.path,
            found=kind,
            hint=what_helps(key, kind, file.path),
        )
    try:
        content = loads(text.encode())
    except ValueError as error:
        raise bad(file, what, f"{key!r} is {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise bad(file, what, f"{key!r} is not an object with tensors")
    found = content.get("version")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise bad(file, what, "it has no version number")
    if found > version:
        raise CorruptFileError(
            f"the {what} has a newer version",
            file=file.path,
            expected=f"{version} or older",
            found=found,
            hint=UPDATE,
        )
    return content


def require_entry(file: TensorFile, what: str, entry: TensorInfo) -> None:
    """Raise a `CorruptFileError` unless the file has an entry of this name, dtype and shape."""
    if (found := file.tensors.get(entry.name)) != entry:
        raise CorruptFileError(
            f"a damaged {what}: its entry {entry.name} does not fit",
            file=file.path,
            expected=entry.describe(),
            found=found.describe() if found else "nothing",
        )


def bad(file: TensorFile, what: str, why: str, tensor: str | None = None) -> CorruptFileError:
    """The error for a damaged ``what``."""
    return CorruptFileError(f"a damaged {what}: {why}", file=file.path, tensor=tensor)
