"""One process of a DDP run under a Trainer that saves patches, and of one that resumes: see test_trainer."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_support import trainer_of
from tuning_support import llama


def train(out: Path, name: str, resume: bool) -> None:
    trainer = trainer_of(out, llama(), ddp_backend="gloo", per_device_train_batch_size=1, weight_decay=0.0)
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 6
    trainer.save_model(str(out / name))


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(out, "whole", resume=False)
    dist.barrier()
    if dist.get_rank() == 0:
        for step in (4, 6):
            shutil.rmtree(out / f"checkpoint-{step}")
    dist.barrier()
    train(out, "resumed", resume=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
