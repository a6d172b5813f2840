"""Lossless patches with errors in their parts and a hash that fits: they reach what lies behind the hash."""

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

__all__ = ["mutate_lossless"]

_PARTS = ("form", "table", "size", "changed", "before", "after", "layout", "tables", "side")
_SIZES = {"U8": 1, "U16": 2, "U32": 4, "U64": 8}

Entries = dict[str, tuple[str, bytes]]


def mutate_lossless(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A lossless patch, mutated as a file, or in one of its parts."""
    if rng.random() < 0.2:
        return mutate_safetensors(rng, data, others)
    try:
        length = struct.unpack("<Q", data[:8])[0]
        manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["neuron_patch"])
        entries = {name: (entry["dtype"], bytes(entry["data"])) for name, entry in deserialize(data)}
        if rng.random() < 0.2:
            mutate_json(rng, manifest)
        else:
            name = rng.choice(list(entries))
            entries[name] = entries[name][0], _part(rng, name, entries[name][1])
        return _written(entries, manifest)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return mutate_bytes(rng, data, others)


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


def _written(entries: Entries, manifest: Any) -> bytes:
    zeros = f"xxh3-128:{0:032}"
    text = dumps(manifest | {"content_hash": zeros})
    state = xxhash.xxh3_128(text.encode())
    for way in ("forward", "backward") if manifest.get("reversible") is True else ("forward",):
        for part in _PARTS:
            content = entries.get(f"{way}:{part}", ("", b""))[1]
            state.update(f"\n{way}:{part}\n{len(content)}\n".encode() + content)
    text = text.replace(zeros, f"xxh3-128:{state.hexdigest()}")
    header: dict[str, Any] = {"__metadata__": {"neuron_patch": text}}
    end = 0
    for name, (dtype, content) in entries.items():
        stop = end + len(content)
        count = len(content) // _SIZES.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, stop]}
        end = stop
    text = dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(content for _, content in entries.values())
