"""Loads the model with transformers, replaces rows, calls ``save_pretrained``."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rivals.script import rows_of, sync, timed


def save(base: str, patch: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (index, value) in rows_of(patch).items():
            weights[name][index] = value
    model.save_pretrained(out)
    sync(out)


def main() -> None:
    timed(save)


if __name__ == "__main__":
    main()
