"""Scores every row of every matrix in a loop of safetensors and numpy; saves scores and their sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import save_file

from benchmarks.rivals.script import timed


def matrices(folder: str) -> dict[str, NDArray[np.uint16]]:
    """The bits of each bf16 matrix by name: numpy has no such type, so safetensors cannot give it as one."""
    tensors = deserialize((Path(folder) / "model.safetensors").read_bytes())
    return {
        name: np.frombuffer(one["data"], np.uint16).reshape(one["shape"])
        for name, one in tensors
        if len(one["shape"]) == 2 and "embed" not in name and "mlp.gate." not in name
    }


def wide(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def compare(base_folder: str, tuned_folder: str, out: str) -> dict[str, int]:
    base, tuned = matrices(base_folder), matrices(tuned_folder)
    found: dict[str, list[NDArray[np.generic]]] = {
        key: [] for key in ("score", "base_sq", "delta_sq", "dot", "changed")
    }
    for name, a in sorted(base.items()):
        b = tuned[name]
        x = wide(a)
        d = wide(b) - x
        aa, dd, ad = np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", d, d), np.einsum("ij,ij->i", x, d)
        found["score"].append((1 - (aa + ad) / np.sqrt(aa * (aa + 2 * ad + dd))).astype(np.float32))
        found["base_sq"].append(aa)
        found["delta_sq"].append(dd)
        found["dot"].append(ad)
        found["changed"].append((a != b).sum(1, dtype=np.uint32))
    save_file({key: np.concatenate(several) for key, several in found.items()}, out)
    return {"neurons": sum(map(len, found["score"]))}


if __name__ == "__main__":
    timed(compare)
