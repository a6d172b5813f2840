"""The golden neuron patches of version 2, written from the format's text alone: no line of the package runs.

``python tests/patch/golden_neuron_patches.py`` (with ``PYTHONPATH=tests``) writes them again, the same to the
byte, into ``tests/patch/golden``. They are never to be changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from support import raw_file, sealed, vectors_of

HERE = Path(__file__).parent / "golden"

#: A base of several dtypes; a NaN with a payload, infinities and a negative zero are among the elements.
BASE: dict[str, tuple[str, np.ndarray]] = {
    "kernel": ("F16", (np.arange(12, dtype="u2") * 1031).reshape(3, 4)),
    "l.0.weight": ("BF16", (np.arange(20, dtype="u2") * 3277).reshape(5, 4)),
    "l.0.weight_scale": ("F32", np.array([0x3F800000, 0x7FC01234, 0x80000000, 0xFF800000], "u4")),
    "l.1.weight": ("BF16", (np.arange(18, dtype="u2") * 3641 + 7).reshape(6, 3)),
    "l.10.experts": ("F32", (np.arange(24, dtype="u4") * 178956971).reshape(2, 3, 4)),
    "tokens": ("I8", (np.arange(6, dtype="u1") * 43).reshape(2, 3)),
    "ünï \U0001f9e0": ("F64", np.arange(4, dtype="u8").reshape(2, 2) * np.uint64(0x0123456789ABCDEF)),
}

#: Of each patch, by tensor: neuron axes, neurons, whether the replaced vectors are in the file.
PATCHES: dict[str, tuple[str, dict[str, tuple[list[int], list[int], bool]]]] = {
    "reversible": (
        "<i4",
        {
            "kernel": ([1], [0, 3], True),
            "l.0.weight": ([0], [1, 2, 4], True),
            "l.1.weight": ([0], [0], True),
            "l.10.experts": ([0, 2], [1, 5, 6], True),
            "tokens": ([0], [1], True),
            "ünï \U0001f9e0": ([0], [0, 1], True),
        },
    ),
    "in-part": (
        "<i8",
        {
            "l.0.weight": ([0], [3], False),
            "l.0.weight_scale": ([0], [1, 2], True),
            "l.1.weight": ([0, 1], [0, 17], True),
            "l.10.experts": ([0], [], False),
        },
    ),
}


def changed(bits: np.ndarray) -> np.ndarray:
    """The new values: the bits of each element rotated by three, and two of them flipped."""
    three, rest, five = map(bits.dtype.type, (3, bits.itemsize * 8 - 3, 5))
    return ((bits << three) | (bits >> rest)) ^ five


def hashed(digests: bytes) -> str:
    return f"xxh3-128:{xxhash.xxh3_128(digests).hexdigest()}"


def write(name: str, folder: Path) -> Path:
    """Write one of the patches into ``folder``."""
    kind, chosen = PATCHES[name]
    index, digests = b"", b""
    values: dict[str, tuple[str, bytes]] = {}
    tensors: dict[str, Any] = {}
    for tensor, (axes, neurons, reversible) in sorted(chosen.items()):
        dtype, bits = BASE[tensor]
        old, new = (np.ascontiguousarray(vectors_of(b, axes)[neurons]) for b in (bits, changed(bits)))
        before, after = (b"".join(map(xxhash.xxh3_128_digest, rows)) for rows in (old, new))
        index += np.array(neurons, kind).tobytes()
        digests += before
        for part, rows in (("value", new), *([("base", old)] if reversible else [])):
            entry = f"{part}:{dtype}"
            values[entry] = dtype, values.get(entry, ("", b""))[1] + rows.tobytes()
        described = {"shape": list(bits.shape), "dtype": dtype, "neuron_axes": axes, "rows": len(neurons)}
        tensors[tensor] = described | ({"reversible": True} if reversible else {})
        tensors[tensor] |= {"base_hash": hashed(before), "patched_hash": hashed(after)}
    manifest = {
        "version": 2,
        "kind": "neurons",
        "base": {"name": "golden", "fingerprint": None},
        "selection": {"captured": 1e-05, "policy": "sensitive"},
        "created_by": "by hand",
        "unknown": {"ünï": [1.0, -0.0, 1e22]},
        "groups": [],
        "tensors": tensors,
    }
    count, size = len(digests) // 16, int(kind[-1])
    entries = [("index", f"I{8 * size}", [count], index)]
    for entry, (dtype, content) in sorted(values.items()):
        itemsize = next(bits.itemsize for known, bits in BASE.values() if known == dtype)
        entries.append((entry, dtype, [len(content) // itemsize], content))
    entries.append(("base_digest", "U8", [count, 16], digests))
    return raw_file(folder / f"neurons-{name}.safetensors", entries, sealed(manifest, [("index", index)]))


if __name__ == "__main__":
    for one in PATCHES:
        print(write(one, HERE))
