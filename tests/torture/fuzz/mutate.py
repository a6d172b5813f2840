"""Nearly valid inputs: a valid file with a few errors in its bytes, its JSON or its shapes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["Mutator", "mutate_bytes", "mutate_json", "mutate_safetensors", "mutate_text"]

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

NUMBERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, -1, -2, 2**15, 2**31 - 1, 2**31, 2**32, 2**53,
    2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40, -(2**63), 0.0, 0.5, -0.5, 1e300, 1e-300,
)  # fmt: skip
TEXTS = (
    "", " ", "/", "..", ".", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "\0", "\x1b[31m", "é", "é",
    "\ud800", "\U0001d518", "x" * 300, "x" * 10_000, "a.weight", "b.weight", "a.weight:index", "__metadata__",
    "model.safetensors", "F32", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "F128", "f32",
    "xxh3-128:" + "0" * 32, "NaN", "Infinity", "1e999", "null", "true", "llama", "gpt2", "mixtral", "*",
    "!!python/object/apply:os.system ['id']", "(?:a+)+$", "hf_" + "x" * 34, "~", "$HOME", "%s%s%n", "{0}",
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"NaN", b"-", b"1e999", b"\\u0000",
    b"\\ud800", b"\xff", b"\x00", b"\n", b"  ", b"- ", b"&a ", b"*a", b"<<: *a", b"!!python/name:os.system ",
    b"!!binary ", b"!!timestamp ", b"? ", b"|", b">", b"%YAML 9.9\n", b"---\n", b"...\n", b"#", b"'", b"\t",
    b"__metadata__", b"data_offsets", b"dtype", b"shape", b"0", b"9" * 30, b"0x10", b"0o7", b"1_0",
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A few bytes flipped, inserted, removed or copied, or a piece of another input inserted."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(10):
            case 0 if content:
                content[min(place, len(content) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                content[place:place] = rng.choice(TOKENS)
            case 2:
                del content[place : place + rng.choice((1, 1, 2, 8, 64))]
            case 3:
                del content[place:]
            case 4:
                stop = place + rng.choice((1, 4, 8, 32))
                content[place:place] = content[place:stop]
            case 5:
                content[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS[:25]) % 2**64)
            case 6 if others:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                content[place:place] = other[start : start + rng.choice((4, 16, 64, 256))]
            case 7:
                content[place:place] = rng.choice((b"[", b'{"a":', b"- ", b"(")) * rng.choice((3, 900, 9000))
            case 8:
                content[place : place + rng.choice((1, 8))] = rng.randbytes(rng.choice((1, 8)))
            case _:
                content += bytes(rng.choice((1, 8, 100)))
    return bytes(content[:100_000])


def _value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(8):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2 | 3:
            return rng.choice(NUMBERS)
        case 4 | 5:
            return rng.choice(TEXTS)
        case 6 if depth < 3:
            return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 7 if depth < 3:
            return {rng.choice(TEXTS): _value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(NUMBERS)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key within a document."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, child in items:
            yield one, key
            waiting.append(child)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """A few values of a JSON document replaced, removed, renamed, doubled or swapped; changes ``value``."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return _value(rng)
        home, key = rng.choice(places)
        match rng.randrange(7):
            case 0 | 1:
                home[key] = _value(rng)
            case 2:
                del home[key]
            case 3 if isinstance(home, dict):
                home[rng.choice((*TEXTS, *map(str, home)))] = home.pop(key)
            case 4 if isinstance(home[key], int) and not isinstance(home[key], bool):
                home[key] += rng.choice((-1, 1, 4, -4, 2**31))
            case 5:
                other, place = rng.choice(places)
                if place in other if isinstance(other, dict) else place < len(other):
                    home[key] = json.loads(dumps(other[place]))
            case _ if isinstance(home[key], list):
                home[key] = home[key] * 2 or [0]
    return value


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def mutate_text(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A JSON text, mutated as a document or as bytes."""
    if rng.random() < 0.6:
        try:
            return dumps(mutate_json(rng, json.loads(data))).encode()
        except (ValueError, RecursionError):
            pass
    return mutate_bytes(rng, data, others)


def mutate_safetensors(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A safetensors file, mutated in its header, the document in its metadata, its data, or as bytes."""
    way = rng.random()
    if way < 0.15:
        return mutate_bytes(rng, data, others)
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        if not isinstance(header, dict):
            return mutate_bytes(rng, data, others)
        metadata = header.get("__metadata__")
        if way < 0.65 and isinstance(metadata, dict) and metadata:
            key = rng.choice(list(metadata))
            text = str(metadata[key]).encode("utf-8", "surrogatepass")
            metadata[key] = mutate_text(rng, text, others).decode("utf-8", "replace")
        elif way < 0.75 and body:
            body = _same_length(rng, body)
        else:
            mutate_json(rng, header)
        text = dumps(header).encode()
        if rng.random() < 0.02:  # a key twice
            text = text[:-1] + b"," + text[1:]
    except (ValueError, RecursionError, struct.error):
        return mutate_bytes(rng, data, others)
    size = len(text) + (rng.choice((1, -1, 8)) if rng.random() < 0.05 else 0)
    return struct.pack("<Q", max(0, size)) + text + body


def _same_length(rng: random.Random, body: bytes) -> bytes:
    content = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(content))
        number = struct.pack("<q", rng.choice((0, -1, 5, 2**31, 2**62)))
        new = rng.choice((number, rng.randbytes(4), b"\xff" * 4))
        content[place : place + len(new)] = new[: len(content) - place]
    return bytes(content)
