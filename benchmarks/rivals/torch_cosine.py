"""Per-tensor ``cosine_similarity`` over ``safe_open``: how most scripts compare two checkpoints."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.rivals.script import timed


def compare(base_folder: str, tuned_folder: str, dtype_name: str = "float32") -> dict[str, int]:
    dtype, scores = getattr(torch, dtype_name), {}
    with ExitStack() as stack:
        base, tuned = (_tensors(Path(folder), stack) for folder in (base_folder, tuned_folder))
        for name, file in base.items():
            a, b = file.get_tensor(name), tuned[name].get_tensor(name)
            if a.ndim > 1:
                scores[name] = 1 - torch.cosine_similarity(a.to(dtype), b.to(dtype), dim=-1)
    return {"neurons": sum(map(len, scores.values()))}


def _tensors(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """The open file of each tensor."""
    files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping


def main() -> None:
    timed(compare)


if __name__ == "__main__":
    main()
