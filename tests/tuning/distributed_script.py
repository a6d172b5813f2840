"""One of two processes that train chosen neurons under DDP or FSDP2: see test_distributed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuning_support import FAMILIES, batch, bits, llama, select

import neftsurgery as ns

STEPS, ADAM = 4, {"lr": 1e-2, "weight_decay": 0.1}


def main(kind: str, mode: str, root: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'meeting'}", rank=rank, world_size=2)
    model = llama()
    before = bits(model.state_dict())
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]), mode=mode)  # type: ignore[arg-type]
    wrapped: torch.nn.Module = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(attached.parameters(), **ADAM)
    for step in range(STEPS):
        if step == STEPS // 2:  # the values, all of them, from every process alike
            attached.load_state_dict(attached.state_dict())
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch(step, size=4).items()}
        optimizer.zero_grad()
        wrapped(**part).loss.backward()
        optimizer.step()
    attached.patch(root / f"patch {rank}").close()
    if kind == "ddp":
        attached.detach()
        assert bits(model.state_dict()) == before
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
