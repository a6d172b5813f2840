"""What the hooks around an optimizer's step refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuning_support import bits, llama, select

import neftsurgery as ns

UP = "model.layers.0.mlp.up_proj.weight"


def test_casting_the_model_afterwards() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    optimizer = torch.optim.SGD(attached.parameters())
    model.to(torch.bfloat16)
    with pytest.raises(ns.UsageError, match="was cast"):
        optimizer.step()
    attached.detach()
    assert bits(model.state_dict()) == bits(llama().to(torch.bfloat16).state_dict())


def test_a_step_writes_the_values_into_the_weight() -> None:
    """Without a forward pass, and for an optimizer of other parameters not at all."""
    model, other = llama(), torch.nn.Parameter(torch.ones(2))
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    (rows,) = attached.parameters()
    weight = model.get_parameter(UP)
    version = weight._version
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=1).step()
    assert weight._version == version
    rows.grad = torch.full_like(rows, -1)
    torch.optim.SGD([rows], lr=1).step()
    assert torch.equal(weight[[1]], rows.detach())
    assert weight._version > version


class _Unread(nn.Module):
    """It computes with one of its layers, and with the experts that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = nn.Linear(3, 3), nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.others = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, *experts: int) -> Tensor:
        x = self.read(x) + self.unread.weight.new_zeros(1) + self.others[0](x)
        return x + sum(self.experts[expert](x) for expert in experts)


def _messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("neftsurgery")]


@pytest.mark.parametrize("mode", ["scatter", "overlay"])
def test_weights_that_the_first_backward_pass_does_not_reach_are_named(
    caplog: pytest.LogCaptureFixture, mode: Any
) -> None:
    """Once. An expert that no token visited is none of them, where others of its kind were reached."""
    model = _Unread()
    names = [
        f"{name}.weight" for name in ("read", "unread", "others.0", "others.1", "experts.0", "experts.1")
    ]
    attached = ns.attach(model, select(model, {name: ([0], [1]) for name in names}), mode=mode)
    optimizer = torch.optim.SGD(attached.parameters())
    optimizer.step()  # nothing was computed yet
    assert not _messages(caplog)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3), 1).sum().backward()
        optimizer.step()
    (said,) = _messages(caplog)
    assert all(name in said for name in ("unread.weight", "others.1.weight"))
    assert "others.0" not in said
    assert "experts" not in said
    attached.detach()
    caplog.clear()
    with ns.attach(model, select(model, {name: ([0], [1]) for name in names}), mode=mode) as attached:
        model(torch.ones(2, 3)).sum().backward()
        torch.optim.SGD(attached.parameters()).step()
    assert "experts.0.weight, experts.1.weight" in _messages(caplog)[0]


def test_nothing_is_said_where_every_weight_trains(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    caplog.set_level(logging.INFO, "neftsurgery")
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(attached.parameters()).step()
    assert not _messages(caplog)
