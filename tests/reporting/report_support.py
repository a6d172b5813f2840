"""Scores files for the tests of the report, written and read by numpy and the safetensors package alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Sums = Mapping[str, Mapping[str, NDArray[Any]]]


def write_scores(path: Path, tensors: Sums, widths: Mapping[str, int], **facts: Any) -> Path:
    """A scores file of tensors ``[n, width]``, each with its ``score`` and any of the sums."""
    entries: dict[str, NDArray[Any]] = {}
    for name, parts in tensors.items():
        entries[name] = parts["score"].astype(np.float32)
        entries |= {f"{name}:{which}": values for which, values in parts.items() if which != "score"}
    told = {
        name: {"shape": [len(parts["score"]), widths[name]], "dtype": "BF16", "neuron_axes": [0]}
        for name, parts in tensors.items()
    }
    document = {"version": 1, "score": "cosine", "anatomy": "rows", **facts, "tensors": told}
    save_file(entries, path, {"neuron_scores": json.dumps(document)})
    return path


def seven_billion(path: Path, seed: int = 0) -> Path:
    """Scores like those of a Llama-2-7B: 1,359,872 neurons of 224 tensors."""
    rng = np.random.default_rng(seed)
    tensors, widths = {}, {}
    for layer in range(32):
        for kind, rows, width in (
            ("self_attn.q_proj", 4096, 4096),
            ("self_attn.k_proj", 4096, 4096),
            ("self_attn.v_proj", 4096, 4096),
            ("self_attn.o_proj", 4096, 4096),
            ("mlp.gate_proj", 11008, 4096),
            ("mlp.up_proj", 11008, 4096),
            ("mlp.down_proj", 4096, 11008),
        ):
            name = f"model.layers.{layer}.{kind}.weight"
            base_sq = width * 4e-4 * rng.lognormal(0, 0.3, rows)
            delta_sq = base_sq * 1e-5 * rng.lognormal(layer / 32, 0.8, rows)
            tensors[name] = {"score": delta_sq / base_sq / 2, "base_sq": base_sq, "delta_sq": delta_sq}
            widths[name] = width
    return write_scores(path, tensors, widths, parameters=6_738_415_616)


def read(path):
    """All neurons of a scores file, one after the other: score, |a|^2, |d|^2, tensor name, index, kind."""
    with safe_open(path, "numpy") as file:
        told = json.loads(file.metadata()["neuron_scores"])
        names = sorted(told["tensors"])
        entries = [told["tensors"][name] for name in names]
        if told["version"] > 1:
            entries = [told["descriptions"][number] for number in entries]
        counts, widths = zip(*(entry["shape"] for entry in entries), strict=True)
        if told["version"] == 1:
            score, base, delta = (
                np.concatenate([file.get_tensor(name + part) for name in names])
                for part in ("", ":base_sq", ":delta_sq")
            )
        else:
            score, base = file.get_tensor("score"), file.get_tensor("base_sq")
            delta = file.get_tensor("delta_sq")[: len(score)]
    rest = sum(entry["delta_sq"] or 0 for entry in told.get("unscored", {}).values())
    tensor = np.repeat(names, counts)
    index = np.concatenate([np.arange(count) for count in counts])
    return score.astype(np.float64), base, delta, tensor, index, rest, np.repeat(widths, counts)


def best(score, count):
    """A mask of the ``count`` highest scores."""
    mask = np.zeros(len(score), bool)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


def kinds_of(tensor):
    return np.array([name.split(".", 3)[3].removesuffix(".weight") for name in tensor])
