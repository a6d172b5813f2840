"""Federated averaging of neuron patches: clients train on private data and send a patch.

$ python federate.py MODEL SELECTION DATA.jsonl OUT --clients 3 --rounds 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import neftsurgery as ns


def train(base: Path, rows: list[dict[str, str]], given: argparse.Namespace, out: Path) -> ns.Patch:
    """One client's round: train from the round's base on the client's own rows, and return the patch."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    with ns.attach(model, ns.Selection.load(given.selection)) as attached:
        optimizer = torch.optim.AdamW(attached.parameters(), lr=given.learning_rate, weight_decay=0.0)
        for start in range(0, len(rows), 16):
            texts = [
                row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows[start : start + 16]
            ]
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"  {out.name}: {len(rows)} examples, loss {loss.item():.3f}")
        return attached.patch(out)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for name in ("model", "selection", "data", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--clients", type=int, default=3)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=3e-3)
given = parser.parse_args()
rows = [json.loads(line) for line in given.data.read_text().splitlines()]
shares = [rows[client :: given.clients] for client in range(given.clients)]
given.out.mkdir()
base = given.model
for number in range(1, given.rounds + 1):
    print(f"round {number}, from {base}")
    patches = [
        train(base, share, given, given.out / f"round{number}-client{n}.safetensors")
        for n, share in enumerate(shares)
    ]
    mean = ns.merge(
        patches,
        on_overlap="mean",
        weights=[len(s) for s in shares],
        out=given.out / f"round{number}.safetensors",
    )
    ns.apply(base, mean, out=given.out / f"round{number}")
    base = given.out / f"round{number}"
