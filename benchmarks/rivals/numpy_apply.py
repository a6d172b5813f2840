"""Puts the rows of a patch into a checkpoint of one file in a loop of safetensors and numpy.

As `apply` does, it compares the fingerprint of the base, the digest of each row that it replaces, and the
hashes of what the patch holds; and it ends with a sync.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import TensorSpec, deserialize, safe_open, serialize_file

from benchmarks.rivals.script import sync, timed

NUMPY = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
Array = NDArray[np.unsignedinteger[Any]]
TYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def require(right: bool, message: str) -> None:
    if not right:
        raise SystemExit(message)


def digests_of(rows: Array) -> bytes:
    return b"".join(map(xxhash.xxh3_128_digest, rows))


def hash_of(raw: bytes) -> str:
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(raw)}"


def fingerprint(arrays: Mapping[str, Array], names: Mapping[str, str]) -> str:
    """As docs/patch-format.md has it; ``names`` of the dtypes."""
    state = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        raw = array.reshape(-1).view(np.uint8).data
        about = json.dumps([name, names[name], array.shape], separators=(",", ":"))
        state.update(b"%s\n%s%s" % (about.encode(), raw[:4096], raw[-4096:]))
    return f"xxh3-128:{state.hexdigest()}"


def apply(base: str, patch: str, out: str) -> None:
    with safe_open(patch, "np") as file:
        manifest = json.loads(file.metadata()["neuron_patch"])
    parts = {name: one["data"] for name, one in deserialize(Path(patch).read_bytes())}
    index, digests = np.frombuffer(parts["index"], np.int32), bytes(parts["base_digest"])
    with safe_open(Path(base) / "model.safetensors", "np") as file:
        metadata = file.metadata()
    arrays, specs, dtypes = dict[str, Array](), {}, {}
    for name, one in deserialize((Path(base) / "model.safetensors").read_bytes()):
        dtypes[name] = one["dtype"]
        array = arrays[name] = np.frombuffer(one["data"], NUMPY[one["dtype"]]).reshape(one["shape"])
        specs[name] = TensorSpec(
            dtype=TYPES[one["dtype"]], shape=one["shape"], data_ptr=array.ctypes.data, data_len=array.nbytes
        )
    require(fingerprint(arrays, dtypes) == manifest["base"]["fingerprint"], "another base")
    at, used = 0, dict.fromkeys(parts, 0)
    for name, entry in sorted(manifest["tensors"].items()):
        dtype, count, array = entry["dtype"], entry["rows"], arrays[name]
        rows = index[at : at + count]
        replaced = digests[16 * at : 16 * (at + count)]
        key = f"value:{dtype}"
        values = np.frombuffer(parts[key], NUMPY[dtype], count * array.shape[1], used[key])
        new = values.reshape(count, -1)
        require(digests_of(array[rows]) == replaced, f"{name}: another base")
        require(hash_of(replaced) == entry["base_hash"], f"{name}: a damaged patch")
        require(hash_of(digests_of(new)) == entry["patched_hash"], f"{name}: a damaged patch")
        array[rows] = new
        at, used[key] = at + count, used[key] + values.nbytes
    Path(out).mkdir()
    shutil.copy(Path(base) / "config.json", out)
    serialize_file(specs, str(Path(out) / "model.safetensors"), metadata)
    sync(out)


if __name__ == "__main__":
    timed(apply)
