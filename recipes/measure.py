"""Measure patches: compare the answers of the base and of patched models with the right ones, in a table.

$ python measure.py maths/run --by number             # is the last number of the answer the right one?
$ python measure.py maths/run maths/run-random --by number    # with the control beside it
$ python measure.py translation/run --by bleu         # BLEU and chrF: pip install sacrebleu
$ python measure.py RUN --by exact --patch merged.safetensors --examples 100
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import datasets
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import neftsurgery as ns


def score(by: str, answers: list[str], right: list[str]) -> str:
    """The score of the answers, as text."""
    if by == "bleu":
        import sacrebleu

        bleu = sacrebleu.corpus_bleu(answers, [right], tokenize="zh").score
        return f"BLEU {bleu:.2f}, chrF {sacrebleu.corpus_chrf(answers, [right]).score:.2f}"
    if by == "number":
        answers, right = (
            [(re.findall(r"-?[\d.,]*\d", t) or [""])[-1] for t in ts] for ts in (answers, right)
        )
    return f"{sum(a == r for a, r in zip(answers, right, strict=True)) / len(right):.1%} right"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("runs", type=Path, nargs="+", help="folders that `neftsurgery train` made, of one base")
parser.add_argument("--by", choices=["exact", "number", "bleu"], default="exact")
parser.add_argument("--patch", type=Path, help="default: the patches of the runs")
parser.add_argument("--examples", type=int, default=200)
parser.add_argument("--tokens", type=int, default=256, help="maximum length of an answer")
given = parser.parse_args()
recipe = yaml.safe_load((given.runs[0] / "recipe.yaml").read_text())
data, device = recipe["data"], "cuda" if torch.cuda.is_available() else "cpu"
named, split = (data["eval"], data["eval_split"]) if data["eval"] else (data["train"], data["split"])
local = {"path": "json", "data_files": named, "split": "train"}
rows = datasets.load_dataset(
    **local if Path(named).exists() else {"path": named, "name": data["subset"], "split": split}
)
rows = rows.select(range(min(given.examples, len(rows))))
prompts, right = ([(data[k] or f"{{{k}}}").format(**row) for row in rows] for k in ("prompt", "completion"))
tokenizer = AutoTokenizer.from_pretrained(recipe["model"], padding_side="left")
model = AutoModelForCausalLM.from_pretrained(recipe["model"]).to(device)


def measure(name: str) -> None:
    """Answer all prompts with the model in its current state, and print the score."""
    answers = []
    for start in range(0, len(prompts), 16):
        batch = tokenizer(prompts[start : start + 16], padding=True, return_tensors="pt").to(device)
        ids = model.generate(**batch, max_new_tokens=given.tokens, do_sample=False)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name:24}{score(given.by, [a.strip() for a in answers], [r.strip() for r in right])}")


measure("base")
for patch in [given.patch] if given.patch else [run / "neuron_patch.safetensors" for run in given.runs]:
    with ns.attach(model, ns.Patch.load(patch)):
        measure(patch.stem if given.patch else patch.parent.name)
