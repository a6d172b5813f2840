"""A base on disk and patches of it, for the tests that attach patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuning_support import FAMILIES, batch, bits, llama, saved, select

import neftsurgery as ns

# A patch may touch any weight, not only those that can be trained.
MORE = {"model.norm.weight": ([0], [0, 15]), "model.layers.1.mlp.gate_proj.weight": ([0], [0, 1])}

PICKS = FAMILIES["llama"][1]

OTHER = {
    "model.layers.0.mlp.up_proj.weight": ([0], [5, 6]),
    "model.layers.0.mlp.gate_proj.weight": ([0], [2]),
}


class ModelOnDisk:
    """A base on disk, and patches of it made by training different neurons."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root = root
        self.folder = root / "base"
        self.model = saved(llama().to(dtype), self.folder)
        self.before = bits(self.model.state_dict())

    def patch(self, name: str, picks: Any, seed: int = 0) -> ns.Patch:
        """A patch with values drawn at random, made from files by `extract`."""
        model = type(self.model).from_pretrained(self.folder, dtype="auto")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(self.root / f"{name} tuned")
        return ns.extract(
            self.folder, self.root / f"{name} tuned", select(model, picks), out=self.root / name
        )

    def patched_logits(self, patch: ns.Patch) -> Tensor:
        """The logits of a model loaded from the patched files."""
        ns.apply(self.folder, patch, out=self.root / "patched", force=True)
        return type(self.model).from_pretrained(self.root / "patched", dtype="auto")(**batch()).logits

    def live_logits(self) -> Tensor:
        return self.model(**batch()).logits
