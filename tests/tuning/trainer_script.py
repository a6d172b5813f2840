"""One process of a DDP run under a Trainer that saves patches: see test_trainer."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from trainer_support import trainer_of
from tuning_support import llama

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
    trainer = trainer_of(out, llama(), ddp_backend="gloo", per_device_train_batch_size=1, weight_decay=0.0)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "final"))
