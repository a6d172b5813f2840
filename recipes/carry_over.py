"""Train on a quantized base, and measure how much of the gain its patch brings to the base's own files.

$ pip install bitsandbytes
$ python recipes/carry_over.py recipe.yaml --set 'train.quantization={load_in_4bit: true}'

The recipe is one of `neftsurgery train`, with dev examples. A run that is there already is measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml

import neftsurgery as ns
from neftsurgery.training.examples import collator
from neftsurgery.training.train_plan import plan_train
from neftsurgery.tuning.forwards import keep_gradients


def dev_loss(plan: Any, model: Any) -> float:
    """The mean loss of the tokens to learn in the dev examples."""
    total, count, collate = 0.0, 0, collator(plan.tokenizer)
    for start in range(0, len(plan.examples.dev), 8):
        batch = collate(plan.examples.dev[start : start + 8])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        learned = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch).loss) * learned
        count += learned
    return total / count


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("recipe", type=Path)
parser.add_argument(
    "--set", action="append", default=[], metavar="KEY=VALUE", help="as of `neftsurgery train`"
)
given = parser.parse_args()
overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in given.set)}
plan = plan_train(given.recipe, overrides, force=True)
if not plan.out.exists():
    print(plan.run(note=lambda text: print(text, flush=True)))
patch, losses = ns.Patch.load(plan.out / "neuron_patch.safetensors"), dict[str, float]()
for name in ("quantized", "files"):
    model = plan.load_model(quantized=name == "quantized")
    keep_gradients(model)  # and with them the forward pass that was trained
    losses[name] = dev_loss(plan, model)
    with ns.attach(model, patch, base=plan.recipe.model):
        losses[f"{name}, patched"] = dev_loss(plan, model)
for name, loss in losses.items():
    print(f"{name:20}{loss:.4f}")
gains = [losses[name] - losses[f"{name}, patched"] for name in ("files", "quantized")]
print(f"gain {gains[0]:.4f} on the files, {gains[1]:.4f} on the quantized model: {gains[0] / gains[1]:.1%}")
