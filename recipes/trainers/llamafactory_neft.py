"""LLaMA-Factory with adapters of chosen neurons: its ``train`` and ``export``, after the registering import.

$ python recipes/trainers/llamafactory_neft.py train sft.yaml
$ torchrun --nproc_per_node 2 recipes/trainers/llamafactory_neft.py train sft.yaml
"""

from __future__ import annotations

import sys

from llamafactory.train.tuner import export_model, run_exp

import neftsurgery.peft  # noqa: F401

if __name__ == "__main__":
    {"train": run_exp, "export": export_model}[sys.argv.pop(1)]()
