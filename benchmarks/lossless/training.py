"""Tunes a model in float32 with one thread, and saves what comes of it. What is there already is kept.

``python -m benchmarks.lossless.training WORK SUBJECT KIND RATE STEPS``: its own process, so that the memory
of training does not stay with the measuring one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.log import log
from benchmarks.lossless.models import SUBJECTS, Subject

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def tune(subject: Subject, folder: Path, kind: str, rate: float, saved: Mapping[int, list[str]]) -> None:
    """Train with AdamW, clipped at 1, for as many steps as the last of ``saved``, which lists dtypes by step.

    ``sft``: the mean loss. ``rl``: the loss of each sequence times a random advantage, standardized over
    the batch, as policy gradients weigh it. ``lora``: an adapter is trained, and merged at the end.
    """
    torch.manual_seed(0)
    model = subject.model
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**subject.lora))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, fused=True)
    began = time.perf_counter()
    for step, batch in zip(range(1, max(saved) + 1), subject.batches(), strict=False):
        with torch.autocast("cpu", torch.bfloat16):  # the weights stay float32
            losses = subject.losses(model, batch)
        if kind == "rl":
            advantages = torch.randn(len(losses))
            losses = losses * (advantages - advantages.mean()) / advantages.std()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step in saved:
            log(f"    step {step}, loss {losses.mean():.3f}, {time.perf_counter() - began:.0f} s")
        if step in saved and kind != "lora":
            save(state_of(model), folder, f"{step}-", saved[step])
    if kind == "lora":
        adapter = {name: value for name, value in model.state_dict().items() if "lora_" in name}
        save(adapter, folder, "adapter-", saved[max(saved)])
        save(state_of(model.merge_and_unload()), folder, f"{max(saved)}-", saved[max(saved)])


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """The tensors, tied ones once."""
    seen, found = set[int](), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found[name] = value
    return found


def save(state: Mapping[str, torch.Tensor], folder: Path, name: str, dtypes: list[str]) -> None:
    """Write ``model.safetensors`` of each dtype, whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for dtype in dtypes:
        kept = {n: v.to(DTYPES[dtype]) if v.is_floating_point() else v for n, v in state.items()}
        path = folder / f"{name}{dtype}.safetensors"
        save_file({n: v.contiguous() for n, v in kept.items()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def main(work: str, subject: str, kind: str, rate: str, saved: str) -> None:
    torch.set_num_threads(1)
    root = Path(work) / subject
    loaded = SUBJECTS[subject]()
    if not (root / "base-bf16.safetensors").exists():
        save(state_of(loaded.model), root, "base-", ["f32", "bf16"])
    wanted = {int(step): dtypes for step, dtypes in json.loads(saved).items()}
    tune(loaded, root / f"{kind}-{rate}", kind, float(rate), wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
