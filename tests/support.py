"""What tests are made with: checkpoints written and read independently of us, and commands as processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

Arrays = Mapping[str, NDArray[np.generic]]


def write_file(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint of one file, written by the safetensors package."""
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, metadata)
    path.chmod(0o644)
    return path


def write_folder(
    folder: Path, tensors: Arrays, shards: int = 1, config: dict[str, object] | None = None
) -> Path:
    """A checkpoint folder: one file, or ``shards`` files with an index; tensors dealt round."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        write_file(folder / name, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(hidden: int, ffn: int, layers: int, vocabulary: int, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> NDArray[np.float32]:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weight(vocabulary, hidden),
        "lm_head.weight": weight(vocabulary, hidden),
    }
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            tensors[f"{prefix}{name}.weight"] = weight(*shape)
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    return tensors


LLAMA_CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


Raw = Mapping[str, tuple[str, NDArray[np.unsignedinteger]]]


BITS = {"F64": "u8", "F32": "u4", "F16": "u2", "BF16": "u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}


def raw_file(
    path: Path, tensors: Raw | list[tuple[str, str, list[int], bytes]], metadata: dict[str, str] | None = None
) -> Path:
    """A safetensors file written by hand: any element type, in the order given; arrays hold the bits."""
    if isinstance(tensors, Mapping):
        tensors = [(n, kind, list(bits.shape), bits.tobytes()) for n, (kind, bits) in tensors.items()]
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, kind, shape, data in tensors:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors))
    return path


def raw_folder(folder: Path, tensors: Raw, shards: int = 1, config: dict[str, object] | None = None) -> Path:
    """As `write_folder`, by `raw_file`."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        raw_file(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        raw_file(folder / name, part, {"format": "pt", "part": str(number)})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def raw_read(path: Path) -> dict[str, tuple[str, NDArray[np.unsignedinteger]]]:
    """Every tensor of a file or folder as element type and bits, read by the safetensors package."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            size = len(entry["data"]) // max(1, int(np.prod(entry["shape"])))
            bits = np.frombuffer(entry["data"], f"u{size or 1}").reshape(entry["shape"])
            found[name] = (entry["dtype"], bits)
    return found


def snapshot(path: Path) -> dict[str, tuple[int, str]]:
    """Mode and content of a file, or of everything in a folder, hidden files and links included."""
    found = {}
    for one in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
        name = "" if one == path and path.is_file() else str(one.relative_to(path))
        if one.is_symlink():
            found[name] = (0, f"-> {one.readlink()}")
        else:
            content = hashlib.sha256(one.read_bytes()).hexdigest() if one.is_file() else "folder"
            found[name] = (one.stat().st_mode & 0o7777, content)
    return found


def vectors_of(bits: NDArray[np.generic], axes: Sequence[int]) -> NDArray[np.generic]:
    """The neurons' vectors ``[count, width]`` of a tensor: a transpose and a reshape, by definition."""
    rest = [axis for axis in range(bits.ndim) if axis not in axes]
    count, width = (math.prod(bits.shape[axis] for axis in some) for some in (axes, rest))
    return bits.transpose([*axes, *rest]).reshape(count, width)


def with_vectors(
    bits: NDArray[np.generic], axes: Sequence[int], index: NDArray[np.integer], vectors: NDArray[np.generic]
) -> NDArray[np.generic]:
    """A copy of a tensor in which neurons ``index`` have these vectors."""
    order = [*axes, *(axis for axis in range(bits.ndim) if axis not in axes)]
    changed = vectors_of(bits, axes).copy()
    changed[index] = vectors
    back = changed.reshape([bits.shape[axis] for axis in order]).transpose(np.argsort(order))
    return np.ascontiguousarray(back).reshape(bits.shape)


def patch_manifest(patch: Path) -> dict[str, Any]:
    """The manifest of a patch file."""
    with safe_open(patch, "numpy") as file:
        found = json.loads(file.metadata()["neuron_patch"])
    assert isinstance(found, dict)
    return found


def patch_rows(patch: Path) -> dict[str, tuple[str, NDArray[np.unsignedinteger]]]:
    """``NAME:index``, ``NAME:value`` and so on of a patch of either version, from the format's text alone."""
    entries, manifest = raw_read(patch), patch_manifest(patch)
    if manifest["version"] == 1:
        return entries
    found, used = {}, dict.fromkeys(entries, 0)
    for name, entry in sorted(manifest["tensors"].items()):
        rows, dtype, axes = entry["rows"], entry["dtype"], entry["neuron_axes"]
        width = math.prod(size for axis, size in enumerate(entry["shape"]) if axis not in axes)
        for part in ("index", "base_digest", "value", *(["base"] if entry.get("reversible") else [])):
            place = part if part in entries else f"{part}:{dtype}"
            steps = rows if part in ("index", "base_digest") else rows * width
            kind, bits = entries[place]
            here = bits[used[place] : used[place] + steps]
            assert len(here) == steps
            used[place] += steps
            found[f"{name}:{part}"] = kind, here.reshape(rows, width) if place != part else here
    assert used == {place: len(bits) for place, (_, bits) in entries.items()}
    return found


def content_hash(manifest: str, parts: Iterable[tuple[str, bytes]]) -> str:
    """The hash in a manifest of version 2, from the format's text alone: ``manifest`` has zeros for it."""
    state = xxhash.xxh3_128(manifest.encode())
    for name, content in parts:
        state.update(f"\n{name}\n{len(content)}\n".encode() + content)
    return f"xxh3-128:{state.hexdigest()}"


def sealed(manifest: Mapping[str, object], parts: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """The metadata of a patch file of version 2, with the hash that its parts have."""
    zeros = f"xxh3-128:{0:032}"
    text = json.dumps(dict(manifest) | {"content_hash": zeros})
    return {"neuron_patch": text.replace(zeros, content_hash(text, parts))}


def with_facts(patch: Path, out: Path, **facts: object) -> Path:
    """The same neuron patch with other values of keys in its manifest, and the hash that fits."""
    entries = raw_read(patch)
    parts = [("index", entries["index"][1].tobytes())]
    return raw_file(out, entries, sealed(patch_manifest(patch) | facts, parts))


def as_version_1(patch: Path) -> None:
    """Write a patch file again as one of version 1."""
    manifest = patch_manifest(patch) | {"version": 1}
    for key in ("kind", "content_hash"):
        del manifest[key]
    for entry in manifest["tensors"].values():
        del entry["rows"]
        entry.pop("reversible", None)
    raw_file(patch, patch_rows(patch), {"neuron_patch": json.dumps(manifest)})


def patched_by_hand(
    tensors: Raw, patch: Path, part: str = "value"
) -> dict[str, tuple[str, NDArray[np.generic]]]:
    """What applying a patch file means (``base``: reverting it), in numpy, from the format's text alone."""
    entries, result = patch_rows(patch), dict(tensors)
    for name, entry in patch_manifest(patch)["tensors"].items():
        kind, bits = result[name]
        index = entries[f"{name}:index"][1].astype(np.int64)
        result[name] = kind, with_vectors(bits, entry["neuron_axes"], index, entries[f"{name}:{part}"][1])
    return result


def assert_same_tensors(found: Raw, expected: Raw) -> None:
    """Equal names, element types, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, (kind, bits) in expected.items():
        assert found[name][0] == kind
        np.testing.assert_array_equal(found[name][1], bits.view(found[name][1].dtype), err_msg=name)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object it must be."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def process(*words: object, cwd: Path, **environment: str) -> Result:
    """Runs a command line as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "neftsurgery", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)
