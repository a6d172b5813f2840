"""Loads the model with transformers, replaces rows, calls ``save_pretrained``."""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rivals.patching import rows_of, sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("patch")
    parser.add_argument("out")
    options = parser.parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (index, value) in rows_of(options.patch).items():
            weights[name][index] = value
    model.save_pretrained(options.out)
    sync(options.out)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
