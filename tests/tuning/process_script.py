"""One of two processes that go through several cases, and print which passed: see test_distributed."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tuning_support import rows_of, select

import neftsurgery as ns


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return functional.linear(self.first(x), self.weight[expert])


def experts(rank: int) -> None:
    """In the first step one process visits no expert with rows; in the second both do, or none of them."""
    torch.manual_seed(0)
    model = _Experts()
    x = torch.randn(6, 4)
    weight = model.weight.detach().clone()
    attached = ns.attach(model, select(model, {"weight": ([0, 1], [1, 3, 9]), "first.weight": ([0], [1])}))
    wrapped = DistributedDataParallel(model)
    for visited in ((0, 2), (1, 0)):
        model.zero_grad()
        wrapped(x, visited[rank]).sum().backward()
        whole = weight.clone().requires_grad_()
        losses = [functional.linear(model.first(x).detach(), whole[expert]).sum() for expert in visited]
        (dense,) = torch.autograd.grad(sum(losses), whole)
        expected = dense.view(15, 4)[[1, 3, 9]] / 2
        torch.testing.assert_close(rows_of(attached, "weight").grad, expected)


def _backward(rows: list[int], engine: str) -> tuple[nn.Module, ns.Attached, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    selection = select(model, {"0.weight": ([0], [0, 3]), "1.weight": ([0], rows)})
    attached = ns.attach(model, selection, mode="overlay")
    wrapped = DistributedDataParallel(model) if engine == "ddp" else fully_shard(model)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    wrapped(torch.ones(2, 4)).sum().backward()
    return wrapped, attached, optimizer


def other_neurons(rank: int) -> None:
    """As many, but others, in each process: no wrapper notices. Both processes stop, before the step."""
    for engine in ("ddp", "fsdp"):
        same = _backward([1], engine)
        same[2].step()
        _wrapped, attached, optimizer = _backward([1 + rank], engine)
        before = [parameter.detach().clone() for parameter in attached.parameters()]
        with pytest.raises(ns.UsageError, match=r"tensor 1\.weight: the processes have attached different"):
            optimizer.step()
        for parameter, value in zip(attached.parameters(), before, strict=True):
            assert (parameter == value).all()


def a_process_that_ends(rank: int) -> None:
    """The other one does not wait for it."""
    if rank == 1:
        print("a_process_that_ends", flush=True)
        os._exit(7)
    with pytest.raises(RuntimeError, match="[Cc]onnection"):
        for _ in range(2):
            _backward([1], "ddp")


def main(rendezvous: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for case in (experts, other_neurons, a_process_that_ends):
        case(rank)
        print(case.__name__, flush=True)
    os._exit(0)  # no goodbye to the other


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
