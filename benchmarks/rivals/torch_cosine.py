"""Per-tensor ``cosine_similarity`` over ``safe_open``: how most scripts compare two checkpoints."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    began = time.perf_counter()
    scores = {}
    with ExitStack() as stack:
        base, tuned = (_tensors(folder, stack) for folder in (options.base, options.tuned))
        for name, file in base.items():
            a, b = file.get_tensor(name), tuned[name].get_tensor(name)
            if a.ndim > 1:
                scores[name] = 1 - torch.cosine_similarity(a.to(dtype), b.to(dtype), dim=-1)
    print(json.dumps({"seconds": time.perf_counter() - began, "neurons": sum(map(len, scores.values()))}))


def _tensors(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """The open file of each tensor."""
    files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping


if __name__ == "__main__":
    main()
