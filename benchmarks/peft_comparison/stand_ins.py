"""A small model, small data and a processor in the place of a GPU: tries the comparison's code anywhere.

As a script, it takes the place of ``launch.py``. Nothing of PEFT's code is changed: what it asks torch about
the GPU is answered, and what it loads from the Hub lies in folders of the same names.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = {"max_steps": 4, "eval_steps": 2, "max_seq_length": 256, "batch_size": 2}
SMALL = STEPS | {"generation_kwargs": {"max_length": 300, "max_new_tokens": 8}, "dtype": "float32"}
TRAIN, TEST = 60, 6  # the comparison validates on 50 examples of the training set
EXPECTED = (1.0, 2.0)  # the range that it wants of the base's loss on Wikipedia


def write(folder: Path, gsm8k: Path) -> dict[str, Any]:
    """Writes model and data into ``folder``, which has to be the working directory of the run.

    ``gsm8k`` has ``train.jsonl`` and ``test.jsonl`` with questions and answers. Returns the training
    parameters of such a run.
    """
    counts = {"train": TRAIN, "test": TEST}
    rows = {split: _rows(gsm8k / f"{split}.jsonl", count) for split, count in counts.items()}
    _write(folder / "openai" / "gsm8k" / "main", rows)
    (folder / "openai" / "gsm8k" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in rows)
        + "---\n"
    )
    kept = [
        {"query": row["question"], "response": row["answer"], "type": "GSM", "original_question": ""}
        for row in rows["train"]
    ]
    _write(folder / "meta-math" / "MetaMathQA", {"train": kept})
    texts = [row["answer"] for row in rows["train"]]
    _write(folder / "HuggingFaceFW" / "finewiki", {"train": [{"text": text} for text in texts[:20]]})
    return SMALL | {"model_id": str(_model(folder / "small-model", texts))}


def _rows(file: Path, count: int) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def _write(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _model(folder: Path, texts: list[str]) -> Path:
    """A Llama of 150,000 parameters over bytes, trained until its loss on ``texts`` is in the range."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({text: n for n, text in enumerate(["</s>", *alphabet])}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [torch.tensor(tokenizer(text)["input_ids"])[:256] for text in texts]
    draw, loss = random.Random(0), math.inf
    while loss > sum(EXPECTED) / 2:
        batch = torch.nn.utils.rnn.pad_sequence(draw.sample(rows, 8), True, -100)
        step = model(input_ids=batch.clamp(min=0), labels=batch).loss
        step.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = 0.9 * loss + 0.1 * step.item() if loss < math.inf else step.item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class _Processor(str):
    """The name ``cpu``. The comparison asks it once whether it is a GPU's, and hears yes."""

    asked = False
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if other == "cuda" and not self.asked:
            self.asked = True
            return True
        return str.__eq__(self, other)


def answer_for_a_gpu() -> None:
    """What PEFT's comparison asks of the GPU is answered for the processor, in this process."""
    import peft.utils
    import torch

    peft.utils.infer_device = lambda: _Processor("cpu")
    for name in ("memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cpu, name, lambda: 0)
    for name in ("reset_peak_memory_stats", "manual_seed_all", "empty_cache"):
        setattr(torch.cpu, name, lambda *_: None)
    torch.cpu.get_device_name = lambda *_: "processor"
    if sys.version_info < (3, 12):  # the comparison needs 3.12, for this alone
        tempfile.TemporaryDirectory = _TemporaryDirectory


class _TemporaryDirectory(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    """As of Python 3.12."""

    def __init__(self, *, delete: bool = True, **more: Any) -> None:
        super().__init__(**more)


if __name__ == "__main__":
    from benchmarks.peft_comparison.launch import run_script

    answer_for_a_gpu()
    run_script(sys.argv[1:])
