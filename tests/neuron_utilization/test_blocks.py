"""The stack of blocks of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import neftsurgery as ns
from neftsurgery.neuron_utilization.hidden_states import find_block_stack, hidden_size


class TwoStacks(nn.Module):
    """A model of a vision encoder and a language model, whose config has the depth of the latter."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.text = nn.Module()
        self.text.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))


NAMES = ["vision.layers.0.weight", "text.layers.2.weight", "head.weight"]


def test_the_stack_of_the_language_model() -> None:
    stack = find_block_stack(TwoStacks(num_hidden_layers=3), NAMES)
    assert (stack.path, len(stack.blocks)) == ("text.layers", 3)
    assert [stack.block_of(name) for name in NAMES] == [None, 2, None]


@pytest.mark.parametrize("names", [NAMES, NAMES[2:]])
def test_no_stack_that_can_be_told(names: list[str]) -> None:
    with pytest.raises(ns.MismatchError, match=r"exactly one stack.*expected one stack"):
        find_block_stack(TwoStacks(num_hidden_layers=5), names)


def test_the_hidden_size_of_the_config() -> None:
    assert hidden_size(TwoStacks(hidden_size=4)) == 4
    with pytest.raises(ns.MismatchError, match="no hidden_size"):
        hidden_size(TwoStacks())
