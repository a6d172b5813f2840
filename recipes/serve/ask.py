"""Load an exported adapter with PEFT, and compare its answer with the base's.

$ python ask.py MODEL ADAPTER "shout bird:"
"""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

named, adapter, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(named)
base = AutoModelForCausalLM.from_pretrained(named)
model = PeftModel.from_pretrained(base, adapter)
ids = tokenizer(question, return_tensors="pt")


def answer() -> str:
    """The answer of the model in its current state."""
    out = model.generate(**ids, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


with model.disable_adapter():
    print(f"base:    {answer()}")
print(f"adapter: {answer()}")
