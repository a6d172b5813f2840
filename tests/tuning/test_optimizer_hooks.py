"""What the hooks around an optimizer's step refuse."""

from __future__ import annotations

import pytest
import torch
from tuning_support import bits, llama, select

import neftsurgery as ns

UP = "model.layers.0.mlp.up_proj.weight"


def test_casting_the_model_afterwards() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    optimizer = torch.optim.SGD(attached.parameters())
    model.to(torch.bfloat16)
    with pytest.raises(ns.UsageError, match="were cast"):
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
