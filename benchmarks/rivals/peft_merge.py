"""Merges a LoRA adapter into its base with PEFT and saves the result: how a LoRA becomes a checkpoint.

``--make-adapter`` only writes the adapter: rank 16 on every linear layer, with random numbers.
"""

from __future__ import annotations

import sys

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.rivals.script import sync, timed


def merge(base: str, adapter: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    sync(out)


def make_adapter(base: str, adapter: str, flag: str) -> None:
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    get_peft_model(model, config).save_pretrained(adapter)


def main() -> None:
    timed(make_adapter if "--make-adapter" in sys.argv else merge)


if __name__ == "__main__":
    main()
