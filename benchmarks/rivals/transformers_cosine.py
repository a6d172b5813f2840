"""Loads both models with transformers, then computes the cosine of every row: what a notebook does."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rivals.script import timed


def compare(*folders: str) -> dict[str, int]:
    base, tuned = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in folders)
    others, scores = dict(tuned.named_parameters()), {}
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.ndim > 1:
                scores[name] = 1 - torch.cosine_similarity(weight.float(), others[name].float(), dim=-1)
    return {"neurons": sum(map(len, scores.values()))}


def main() -> None:
    timed(compare)


if __name__ == "__main__":
    main()
