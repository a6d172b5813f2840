"""JSON that takes far more memory or time than its size suggests, as strangers may send it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

__all__ = ["BOMBS", "HARMLESS"]


def _list(one: str) -> Callable[[int], bytes]:
    """A list of one value many times."""
    return lambda nbytes: (
        b"[" + (one.encode() + b",") * (nbytes // (len(one.encode()) + 1)) + one.encode() + b"]"
    )


def _filled(nbytes: int, parts: Iterable[str], brackets: str) -> bytes:
    made, size = [], 0
    for part in parts:
        made.append(part)
        size += len(part.encode()) + 1
        if size >= nbytes:
            break
    return (brackets[0] + ",".join(made) + brackets[1]).encode()


def _keys(nbytes: int) -> bytes:
    return _filled(nbytes, (f'"{number:x}":0' for number in itertools.count()), "{}")


def _wide_keys(nbytes: int) -> bytes:
    return _filled(nbytes, (f'"€{number:x}":0' for number in itertools.count()), "{}")


def _objects(nbytes: int) -> bytes:
    return _filled(nbytes, (f'{{"{number:x}":0}}' for number in itertools.count()), "[]")


def _text(character: str) -> Callable[[int], bytes]:
    return lambda nbytes: f'["{"x" * (nbytes - 10)}{character}"]'.encode()


#: By name; each makes about as many bytes as it is asked for.
BOMBS: dict[str, Callable[[int], bytes]] = {
    "empty lists": _list("[]"),
    "empty objects": _list("{}"),
    "lists": _list("[0]"),
    "objects": _objects,
    "one object": _list('{"a":0}'),
    "nested lists": _list("[" * 50 + "]" * 50),
    "short keys": _keys,
    "wide keys": _wide_keys,
    "digits": _list("0"),
    "numbers": _list("999"),
    "floats": _list("1.5"),
    "short texts": _list('"ab"'),
    "a text": _text("x"),
    "a wide text": _text("😀"),
    "escapes": lambda nbytes: b'["' + b"\\u20ac" * (nbytes // 6) + b'"]',
    "a number": lambda nbytes: b"[" + b"9" * nbytes + b"]",
    "a fraction": lambda nbytes: b"[0." + b"3" * nbytes + b"]",
    "brackets": lambda nbytes: b"[" * (nbytes // 2) + b"]" * (nbytes // 2),
    "braces": lambda nbytes: b'{"a":' * (nbytes // 5),
    "spaces": lambda nbytes: b"[" + b" " * (nbytes - 2) + b"]",
    "spaces and keys": lambda nbytes: _keys(nbytes // 2) + b" " * (nbytes // 2),
    "separators in a text": lambda nbytes: b'["' + b",[{:" * (nbytes // 4) + b'"]',
}
#: Those that every reader of JSON may read, at any size.
HARMLESS = ("a text", "a wide text", "escapes", "a fraction", "spaces")
