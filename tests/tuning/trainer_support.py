"""A tiny Trainer of chosen neurons, for the tests and for the processes they start."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from tuning_support import FAMILIES, batch, llama, select

import neftsurgery as ns
from neftsurgery.tuning.trainer import PatchSaving

PICKS = FAMILIES["llama"][1]


class PatchTrainer(PatchSaving, Trainer):
    """What a user writes."""


def examples(count: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{key: value[0] for key, value in batch(seed, size=1).items()} for seed in range(count)]


def arguments(out: Path, **more: Any) -> TrainingArguments:
    options = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True,
        "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(out), **(options | more))


def trainer_of(out: Path, model: Any = None, **more: Any) -> PatchTrainer:
    """A Trainer of some neurons of a small Llama with dropout, so that random states matter."""
    model = llama(attention_dropout=0.1) if model is None else model
    attached = ns.attach(model, select(model, PICKS), base=False)
    callbacks = more.pop("callbacks", [])
    data = {"train_dataset": more.pop("train", examples()), "eval_dataset": more.pop("dev", None)}
    trainer = PatchTrainer(attached=attached, args=arguments(out, **more), callbacks=callbacks, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Hang(TrainerCallback):
    """Waits to be killed, some steps after the first save."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            print("ready", flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer_of(Path(sys.argv[1]), callbacks=[Hang()]).train()
