"""Experts that train end to end: attached, trained, and back in the layout of the files."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import neftsurgery as ns
from neftsurgery.selection.selection import Selection

from .runnable import runnable
from .tiny_checkpoints import TinyCheckpoints, far, tensors_in

__all__ = ["EXPERTS", "ExpertRun", "train_experts"]

EXPERTS = [
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
    "olmoe",
    "glm4_moe",
    "minimax",
    "granitemoe",
    "jetmoe",
]
_PLACES = (".experts.", ".block_sparse_moe.", "mlp.input_linear", "mlp.output_linear")
_STEPS = 3


@dataclass(frozen=True)
class ExpertRun:
    """What became of the experts of one model type."""

    tensors: int
    neurons: int
    losses: tuple[float, ...]
    moved: int  # tensors of the files that differ after the patch
    apart: float  # logits of the loaded files and of the live model, relative; 0 within 5e-5

    @property
    def right(self) -> bool:
        """Whether they trained, and came back."""
        return self.moved == self.tensors and self.losses[-1] < self.losses[0] and self.apart == 0


def train_experts(model_type: str) -> ExpertRun:
    """Attach 5% of the neurons of each expert tensor, train, patch, apply to the files, load them."""
    folder = Path(tempfile.mkdtemp(prefix=f"{model_type}-experts-"))
    try:
        return _trained(TinyCheckpoints(runnable(model_type), folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trained(case: TinyCheckpoints) -> ExpertRun:
    scores = ns.diff(case.base, case.tuned, threads=1)
    every = scores.select(neurons="5%", per="tensor", policy="random", seed=3)
    experts = {
        name: one
        for name, one in every.tensors.items()
        if any(place in name for place in _PLACES) and "shared" not in name
    }
    model = case.copy()
    attached = ns.attach(model, Selection(experts, every.facts), base=case.base)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.02)
    inputs = _text(model)
    losses = []
    for _ in range(_STEPS):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    patch = attached.patch(case.folder / "experts.safetensors")
    with torch.no_grad():
        live = model(**inputs, labels=inputs["input_ids"])
    losses.append(float(live.loss))
    out = case.folder / "trained"
    ns.apply(case.base, patch, out=out)
    before, after = tensors_in(case.base), tensors_in(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    with torch.no_grad():
        loaded = case.load(out)(**inputs).logits
    return ExpertRun(
        len(experts),
        sum(len(one.index) for one in experts.values()),
        tuple(losses),
        len(moved) if moved == experts.keys() else -1,
        far([live.logits], [loaded]),
    )


def _text(model: Any) -> dict[str, Any]:
    """Enough tokens for every expert to get some."""
    vocabulary = min(model.config.get_text_config().vocab_size, 90)
    tokens = torch.randint(5, vocabulary, (4, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": tokens, "use_cache": False}
