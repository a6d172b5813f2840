"""Patches with errors in their parts and hashes that fit: they reach what lies behind the hashes."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import xxhash
import zstandard
from safetensors import SafetensorError, deserialize

from .mutate import dumps, mutate_bytes, mutate_json, mutate_safetensors, mutate_text

__all__ = ["mutate_lossless", "mutate_neurons"]

_PARTS = ("form", "table", "size", "changed", "before", "after", "layout", "tables", "side")
_SIZES = {"U8": 1, "U16": 2, "U32": 4, "U64": 8, "I32": 4, "I64": 8, "F32": 4, "F64": 8}

Entries = dict[str, tuple[str, bytes]]


_UNREADABLE = (
    SafetensorError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RecursionError, MemoryError, struct.error,
)  # fmt: skip


def mutate_lossless(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A lossless patch, mutated as a file, or in one of its parts, with a hash that fits."""

    def written(entries: Entries, manifest: Any) -> bytes:
        return _written(entries, _hashed(entries, manifest))

    return _mutated(rng, data, others, 0.2, lambda name, _, content: _part(rng, name, content), written)


def mutate_neurons(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A neuron patch, mutated as a file, or in one of its entries, with hashes that fit."""

    def part(name: str, dtype: str, content: bytes) -> bytes:
        if name.endswith("index") and rng.random() < 0.7:
            return _numbers(rng, content, _SIZES[dtype])
        return mutate_bytes(rng, content)[: len(content)].ljust(len(content), b"\1")

    def written(entries: Entries, manifest: Any) -> bytes:
        shapes = {name: entry["shape"] for name, entry in _header(data).items() if name in entries}
        return _written(entries, _hashed(entries, _digested(entries, manifest)), shapes)

    return _mutated(rng, data, others, 0.3, part, written)


def _mutated(
    rng: random.Random,
    data: bytes,
    others: Sequence[bytes],
    whole: float,
    part: Callable[[str, str, bytes], bytes],
    written: Callable[[Entries, Any], bytes],
) -> bytes:
    """Mutated as a file, a share ``whole`` of the times; else the manifest, or ``part`` of an entry."""
    if rng.random() < whole:
        return mutate_safetensors(rng, data, others)
    try:
        entries, manifest = _read(data)
        if rng.random() < 0.2:
            mutate_json(rng, manifest)
        else:
            name = rng.choice(list(entries))
            dtype, content = entries[name]
            entries[name] = dtype, part(name, dtype, content)
        return written(entries, manifest)
    except _UNREADABLE:
        return mutate_bytes(rng, data, others)


def _numbers(rng: random.Random, content: bytes, size: int) -> bytes:
    """Whole numbers, one of them a little larger or smaller."""
    place = rng.randrange(len(content) // size) * size
    number = int.from_bytes(content[place : place + size], "little") + rng.choice((-1, 1, 1, 2, 1 << 20))
    return content[:place] + (number % 256**size).to_bytes(size, "little") + content[place + size :]


def _header(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert isinstance(header, dict)
    return header


def _read(data: bytes) -> tuple[Entries, Any]:
    """The entries and the manifest of a patch."""
    header, found = _header(data), dict(deserialize(data))  # which has them in any order
    entries = {name: (found[name]["dtype"], bytes(found[name]["data"])) for name in header if name in found}
    return entries, json.loads(header["__metadata__"]["neuron_patch"])


def _part(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith((":layout", ":tables")) and rng.random() < 0.9:
        try:
            inner = zstandard.ZstdDecompressor().decompress(content, max_output_size=1 << 20)
        except (zstandard.ZstdError, MemoryError):  # a size that a frame lies about
            return mutate_bytes(rng, content)
        if name.endswith(":tables"):
            inner = mutate_bytes(rng, inner)
        elif rng.random() < 0.5:
            inner = mutate_text(rng, inner)
        else:
            inner = _layout(rng, inner)
        return zstandard.ZstdCompressor().compress(inner)
    changed = mutate_bytes(rng, content)
    same = name.endswith(_PARTS[:6]) or rng.random() < 0.5
    return changed[: len(content)].ljust(len(content), b"\1") if same else changed


def _layout(rng: random.Random, text: bytes) -> bytes:
    """The header of one of the weight files mutated."""
    layout = json.loads(text)
    file = rng.choice(layout["files"])
    file["header"] = dumps(mutate_json(rng, json.loads(file["header"])))
    return dumps(layout).encode()


def _hashed(entries: Entries, manifest: Any) -> str:
    """The text of a manifest, with the hash that fits its entries."""
    if manifest["version"] == 1:
        return dumps(manifest)
    ways = ("forward", "backward") if manifest.get("reversible") is True else ("forward",)
    names = [f"{way}:{part}" for way in ways for part in _PARTS]
    names = ["index"] if manifest.get("kind") == "neurons" else names
    zeros = f"xxh3-128:{0:032}"
    text = dumps(manifest | {"content_hash": zeros})
    state = xxhash.xxh3_128(text.encode())
    for name in names:
        content = entries.get(name, ("", b""))[1]
        state.update(f"\n{name}\n{len(content)}\n".encode() + content)
    return text.replace(zeros, f"xxh3-128:{state.hexdigest()}")


def _digested(entries: Entries, manifest: Any) -> Any:
    """The manifest of a neuron patch, with the hashes of its vectors that fit."""
    used: dict[str, int] = dict.fromkeys(entries, 0)

    def take(name: str, nbytes: int) -> bytes:
        start, used[name] = used[name], used[name] + nbytes
        return entries[name][1][start : used[name]]

    for name, described in sorted(manifest["tensors"].items()):
        old = manifest["version"] == 1
        rows = len(entries[f"{name}:base_digest"][1]) // 16 if old else described["rows"]
        value = f"{name}:value" if old else f"value:{described['dtype']}"
        wide = [size for axis, size in enumerate(described["shape"]) if axis not in described["neuron_axes"]]
        width = math.prod(wide) * _SIZES[entries[value][0]]
        digests = b"".join(xxhash.xxh3_128_digest(take(value, width)) for _ in range(min(rows, 1000)))
        before = take(f"{name}:base_digest" if old else "base_digest", 16 * rows)
        for key, content in (("base_hash", before), ("patched_hash", digests)):
            described[key] = f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}"
    return manifest


def _written(entries: Entries, manifest: str, shapes: dict[str, list[int]] | None = None) -> bytes:
    """The file; entries without a shape are vectors."""
    header: dict[str, Any] = {"__metadata__": {"neuron_patch": manifest}}
    end = 0
    for name, (dtype, content) in entries.items():
        stop = end + len(content)
        shape = [len(content) // _SIZES.get(dtype, 1)] if shapes is None else shapes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        end = stop
    text = dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, content in entries.values())
