"""One of two processes that train chosen neurons, by some engines in turn: see test_distributed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from expert_script import train_experts
from mismatch_script import lost_process, other_neurons
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuning_support import FAMILIES, batch, bits, llama, own_state, select

import neftsurgery as ns

STEPS, ADAM = 4, {"lr": 1e-2, "weight_decay": 0.1}


class Run:
    """A model, the neurons attached to it, and how it is trained."""

    def __init__(self, kind: str, mode: Any) -> None:
        self.accelerator = Accelerator(cpu=True) if kind == "accelerate" else None
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        assert dist.get_world_size() == 2
        self.model = llama()
        self.attached = ns.attach(self.model, select(self.model, FAMILIES["llama"][1]), mode=mode)
        self.wrapped: torch.nn.Module = self.model
        if kind in ("ddp", "zero"):
            self.wrapped = DistributedDataParallel(self.model)
        elif kind == "fsdp":
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer: Any = torch.optim.AdamW(self.attached.parameters(), **ADAM)
        if kind == "zero":
            from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns

            self.optimizer = ZeroRedundancyOptimizer(
                list(self.attached.parameters()), torch.optim.AdamW, **ADAM
            )
        if self.accelerator is not None:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def step(self, step: int) -> None:
        rank = dist.get_rank()
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in batch(step, size=4).items()}
        self.optimizer.zero_grad()
        loss = self.wrapped(**part).loss
        loss.backward() if self.accelerator is None else self.accelerator.backward(loss)
        self.optimizer.step()


def train(kind: str, mode: str, root: Path) -> None:
    before = bits(llama().state_dict())
    run = Run(kind, mode)
    for step in range(STEPS):
        if step == STEPS // 2:  # the values, all of them, from every process alike
            run.attached.load_state_dict(run.attached.state_dict())
            if run.accelerator is not None:
                run.accelerator.save_state(str(root / "state"))
        run.step(step)
    run.attached.patch(root / f"patch {dist.get_rank()}").close()
    if run.accelerator is not None:
        resumed = Run(kind, mode)
        resumed.accelerator.load_state(str(root / "state"))
        for step in range(STEPS // 2, STEPS):
            resumed.step(step)
        assert bits(resumed.model.state_dict()) == bits(run.model.state_dict())
    if kind == "fsdp":
        whole = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True))
        rows = {name: tensor for name, tensor in whole.items() if "_neurons_" in name}
        assert len(rows) == len(FAMILIES["llama"][1])
        for name, parameter in run.attached.named_parameters():
            assert torch.equal(rows[name], parameter.full_tensor())
    else:
        run.attached.detach()
        assert bits(own_state(run.model)) == before


def main(root: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        kind, _, mode = case.partition(" ")
        (root / case).mkdir(exist_ok=True)
        others = {"experts": train_experts, "other neurons": other_neurons, "lost process": lost_process}
        others[case]() if case in others else train(kind, mode, root / case)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{case}: right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
