"""Rows of experts train under DDP in two processes, each with its own tokens: see distributed_script."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
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


def train_experts() -> None:
    """In the first step one process visits no expert with rows; in the second both do, or none of them.

    Both have the mean of their gradients.
    """
    torch.manual_seed(0)
    model = _Experts()
    x = torch.randn(6, 4)
    weight = model.weight.detach().clone()
    attached = ns.attach(model, select(model, {"weight": ([0, 1], [1, 3, 9]), "first.weight": ([0], [1])}))
    wrapped = DistributedDataParallel(model)
    for visited in ((0, 2), (1, 0)):
        model.zero_grad()
        wrapped(x, visited[dist.get_rank()]).sum().backward()
        whole = weight.clone().requires_grad_()
        losses = [functional.linear(model.first(x).detach(), whole[expert]).sum() for expert in visited]
        (dense,) = torch.autograd.grad(sum(losses), whole)
        expected = dense.view(15, 4)[[1, 3, 9]] / 2
        torch.testing.assert_close(rows_of(attached, "weight").grad, expected)
