"""Patches with errors in their parts and hashes that fit: they reach what lies behind the hashes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from typing import Any

import xxhash
import zstandard
from safetensors import SafetensorError, deserialize

from .mutate import dumps, mutate_bytes, mutate_json, mutate_safetensors, mutate_text

__all__ = ["mutate_lossless", "mutate_neurons"]

_PARTS = ("form", "table", "size", "changed", "before", "after", "layout", "tables", "side")
_SIZES = {"U8": 1, "U16": 2, "U32": 4, "U64": 8, "I32": 4, "I64": 8}

Entries = dict[str, tuple[str, bytes]]


_UNREADABLE = (
    SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error
)  # fmt: skip


def mutate_lossless(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A lossless patch, mutated as a file, or in one of its parts."""
    if rng.random() < 0.2:
        return mutate_safetensors(rng, data, others)
    try:
        entries, manifest = _read(data)
        if rng.random() < 0.2:
            mutate_json(rng, manifest)
        else:
            name = rng.choice(list(entries))
            entries[name] = entries[name][0], _part(rng, name, entries[name][1])
        return _written(entries, _hashed(entries, manifest))
    except _UNREADABLE:
        return mutate_bytes(rng, data, others)


def mutate_neurons(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A neuron patch, mutated as a file, or in one of its entries, with hashes that fit."""
    if rng.random() < 0.3:
        return mutate_safetensors(rng, data, others)
    try:
        entries, manifest = _read(data)
        if rng.random() < 0.2:
            mutate_json(rng, manifest)
        else:
            name = rng.choice(list(entries))
            dtype, content = entries[name]
            if name.endswith(":index") and rng.random() < 0.7:
                content = _numbers(rng, content, _SIZES[dtype])
            else:
                content = mutate_bytes(rng, content)[: len(content)].ljust(len(content), b"\1")
            entries[name] = dtype, content
        shapes = {name: entry["shape"] for name, entry in _header(data).items() if name in entries}
        return _written(entries, _digested(entries, manifest, shapes), shapes)
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
    entries = {name: (entry["dtype"], bytes(entry["data"])) for name, entry in deserialize(data)}
    return entries, json.loads(_header(data)["__metadata__"]["neuron_patch"])


def _part(rng: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith((":layout", ":tables")) and rng.random() < 0.9:
        try:
            inner = zstandard.ZstdDecompressor().decompress(content, max_output_size=1 << 20)
        except zstandard.ZstdError:
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


def _hashed(entries: Entries, manifest: Any) -> Any:
    """The manifest of a lossless patch, with the hash that fits."""
    known = {key: value for key, value in manifest.items() if key != "content_hash"}
    state = xxhash.xxh3_128(json.dumps(known, separators=(",", ":"), sort_keys=True).encode())
    for way in ("forward", "backward") if known.get("reversible") is True else ("forward",):
        for part in _PARTS:
            content = entries.get(f"{way}:{part}", ("", b""))[1]
            state.update(f"\n{way}:{part}\n{len(content)}\n".encode() + content)
    return known | {"content_hash": f"xxh3-128:{state.hexdigest()}"}


def _digested(entries: Entries, manifest: Any, shapes: dict[str, list[int]]) -> Any:
    """The manifest of a neuron patch, with the hashes of its vectors that fit."""
    for name, described in manifest["tensors"].items():
        value, count = entries[f"{name}:value"][1], shapes[f"{name}:value"][0]
        width = len(value) // count
        rows = [value[start : start + width] for start in range(0, len(value), width)]
        digests = b"".join(map(xxhash.xxh3_128_digest, rows))
        for key, content in (("base_hash", entries[f"{name}:base_digest"][1]), ("patched_hash", digests)):
            described[key] = f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}"
    return manifest


def _written(entries: Entries, manifest: Any, shapes: dict[str, list[int]] | None = None) -> bytes:
    """The file; entries without a shape are vectors."""
    header: dict[str, Any] = {"__metadata__": {"neuron_patch": dumps(manifest)}}
    end = 0
    for name, (dtype, content) in entries.items():
        stop = end + len(content)
        shape = [len(content) // _SIZES.get(dtype, 1)] if shapes is None else shapes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        end = stop
    text = dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, content in entries.values())
