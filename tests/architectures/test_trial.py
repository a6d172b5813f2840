"""The experiment that swaps units: nothing is heard, or what ties them is named, or nothing explains it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import nn

from tests.architectures.calls import Call
from tests.architectures.feed_forward import LiveBlock, _blocks_of
from tests.architectures.trial import layers_of


class _Block(nn.Module):
    """A feed-forward block, with something between up and down."""

    def __init__(self, between: str, fused: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(6, 20 if fused else 10)
        self.down = nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.randn(10))
        self.between = between

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        value = self.up(hidden)
        if self.up.out_features == 20:
            value, gate = value.chunk(2, -1)
            value = value * gate.sigmoid()
        else:
            value = torch.relu(value) + 0.1 * value
        if self.between == "scale":
            value = value * self.scale
        if self.between == "norm":
            value = value / value.norm(dim=-1, keepdim=True) * self.scale
        if self.between == "neighbour":
            value = value + value.roll(1, -1)
        return self.down(value)


def _found(block: nn.Module) -> list[LiveBlock]:
    call = Call(block, (torch.randn(1, 5, 6),), {})
    return list(_blocks_of(block, layers_of(block), call))


@pytest.mark.parametrize(("between", "tied"), [("", ""), ("scale", "scale"), ("norm", "scale")])
def test_a_block_is_found_with_what_ties_its_units(between: str, tied: str) -> None:
    assert _found(_Block(between)) == [LiveBlock("up", "down", tied=tied)]


def test_a_block_whose_units_have_places_that_nothing_explains_is_not_offered() -> None:
    assert _found(_Block("neighbour")) == []


def test_up_may_come_before_gate_in_a_fused_layer() -> None:
    assert _found(_Block("", fused=True)) == [LiveBlock("up", "down", fused="swapped halves")]
