"""Loads both models with transformers, then computes the cosine of every row: what a notebook does."""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("tuned")
    options = parser.parse_args()
    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    tuned = dict(AutoModelForCausalLM.from_pretrained(options.tuned, dtype="auto").named_parameters())
    scores = {}
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.ndim > 1:
                scores[name] = 1 - torch.cosine_similarity(weight.float(), tuned[name].float(), dim=-1)
    print(json.dumps({"seconds": time.perf_counter() - began, "neurons": sum(map(len, scores.values()))}))


if __name__ == "__main__":
    main()
