"""Merges a LoRA adapter into its base with PEFT and saves the result: how a LoRA becomes a checkpoint.

``--make-adapter`` only writes the adapter: rank 16 on every linear layer, with random numbers.
"""

from __future__ import annotations

import argparse
import json
import time

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.rivals.patching import sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--make-adapter", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype="auto")
    if options.make_adapter:
        config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(options.adapter)
        return
    PeftModel.from_pretrained(model, options.adapter).merge_and_unload().save_pretrained(options.out)
    sync(options.out)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
