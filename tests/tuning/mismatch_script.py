"""Two processes that do not agree, or lose each other: see distributed_script."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tuning_support import select

import neftsurgery as ns


def _backward(rows: list[int], engine: str) -> tuple[nn.Module, ns.Attached, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    selection = select(model, {"0.weight": ([0], [0, 3]), "1.weight": ([0], rows)})
    attached = ns.attach(model, selection, mode="overlay")
    wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    wrapped(torch.ones(2, 4)).sum().backward()
    return wrapped, attached, optimizer


def other_neurons() -> None:
    """As many, but others, in each process: no wrapper notices. Both processes stop, before the step."""
    for engine in ("ddp", "fsdp"):
        same = _backward([1], engine)
        same[2].step()
        _wrapped, attached, optimizer = _backward([1 + dist.get_rank()], engine)
        before = [parameter.detach().clone() for parameter in attached.parameters()]
        with pytest.raises(ns.UsageError, match=r"tensor 1\.weight: the processes have attached different"):
            optimizer.step()
        for parameter, value in zip(attached.parameters(), before, strict=True):
            assert (parameter == value).all()


def lost_process() -> None:
    """One ends without a word. The other has an error, and does not wait for it."""
    _backward([1], "ddp")
    if dist.get_rank() == 1:
        os._exit(0)  # torchrun would end the other too, if this told of a failure
    with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
        _backward([1], "ddp")
    print("lost process: right", flush=True)
    os._exit(0)
