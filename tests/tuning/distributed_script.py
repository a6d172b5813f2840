"""One of two processes that train chosen neurons under DDP, FSDP2 or accelerate: see test_distributed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuning_support import FAMILIES, batch, bits, llama, select

import neftsurgery as ns

STEPS, ADAM = 4, {"lr": 1e-2, "weight_decay": 0.1}


def main(kind: str, mode: str, root: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True) if kind == "accelerate" else None
    if accelerator is None:
        dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    model = llama()
    before = bits(model.state_dict())
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]), mode=mode)  # type: ignore[arg-type]
    wrapped: torch.nn.Module = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    elif kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer: Any = torch.optim.AdamW(attached.parameters(), **ADAM)
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        if step == STEPS // 2:  # the values, all of them, from every process alike
            attached.load_state_dict(attached.state_dict())
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch(step, size=4).items()}
        optimizer.zero_grad()
        loss = wrapped(**part).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
    attached.patch(root / f"patch {rank}").close()
    if kind != "fsdp":
        attached.detach()
        assert bits(model.state_dict()) == before
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
