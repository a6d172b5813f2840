"""Dequantizes each weight with torch and calls ``cosine_similarity``: how scripts compare two such models."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.rivals.script import timed

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SUFFIXES = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}


def fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` with a scale per 128 x 128."""
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.to(torch.float32) * wide[: codes.shape[0], : codes.shape[1]]


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[experts, out, in]``, as transformers' `convert_moe_packed_tensors` does it."""
    out = torch.empty(*blocks.shape[:-1], 2 * blocks.shape[-1])
    out[..., 0::2] = E2M1[(blocks & 15).long()]
    out[..., 1::2] = E2M1[(blocks >> 4).long()]
    return torch.ldexp(out, scales.int().unsqueeze(-1) - 127).flatten(-2)


def compare(base_folder: str, tuned_folder: str, layout: str) -> dict[str, int]:
    dequantize = {"fp8": fp8, "mxfp4": mxfp4}[layout]
    codes, scales = SUFFIXES[layout]
    scores = {}
    with ExitStack() as stack:
        base, tuned = (
            stack.enter_context(safe_open(Path(folder) / "model.safetensors", "pt"))
            for folder in (base_folder, tuned_folder)
        )
        names = set(base.keys())
        for stem in sorted(name.removesuffix(scales) for name in names if name.endswith(scales)):
            parts = [[side.get_tensor(stem + end) for end in (codes, scales)] for side in (base, tuned)]
            a, b = (dequantize(*part) for part in parts)
            scores[stem] = 1 - torch.cosine_similarity(a, b, dim=-1)
    return {"neurons": sum(found.numel() for found in scores.values())}


def main() -> None:
    timed(compare)


if __name__ == "__main__":
    main()
