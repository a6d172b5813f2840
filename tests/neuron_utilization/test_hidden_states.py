"""Mean hidden states, compared with those of transformers; and models that do not pass them on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from tuning_support import bert, gpt2, llama, opt

import neftsurgery as ns
from neftsurgery.neuron_utilization.hidden_states import BlockStack, find_block_stack, mean_hidden_states
from neftsurgery.neuron_utilization.tokenized_text import TokenChunk


@pytest.mark.parametrize("make", [llama, gpt2, bert, opt])
def test_states_are_those_of_transformers(make: Any) -> None:
    """The first enters the blocks, the last has passed through the final norm, and padding does not count."""
    model = make().double()
    pieces = [TokenChunk([5, 6, 7, 8, 9], 0.1), TokenChunk([10, 11], 0.2), TokenChunk([12, 13, 14], 1 / 30)]
    expected = 0
    for piece in pieces:
        with torch.no_grad():
            states = model(torch.tensor([piece.ids]), output_hidden_states=True).hidden_states
        expected = expected + piece.weight * torch.stack([state[0].sum(dim=0) for state in states])
    name = next(name for name, weight in model.named_parameters() if "1." in name and weight.dim() == 2)
    stack = find_block_stack(model, [name])
    done: list[int] = []
    hooks = hooks_of(model)
    for size in (1, 2, 3):
        groups = [pieces[start : start + size] for start in range(0, 3, size)]
        found = mean_hidden_states(model, stack, groups, padding=0, advance=done.append)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert sum(done) == 3 * 10
    assert hooks_of(model) == hooks


def hooks_of(model: torch.nn.Module) -> list[tuple[int, int]]:
    """How many hooks each module has."""
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_only_one_layers_hidden_states_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one layer's hidden states are alive at once, besides what the model holds itself."""
    import weakref

    model, held, most = llama(num_hidden_layers=6), [], 0
    stack = find_block_stack(model, ["model.layers.0.mlp.up_proj.weight"])
    for block in stack.blocks:

        def watch(module: Any, args: Any, output: Any) -> None:
            nonlocal most
            held.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))
            most = max(most, sum(one() is not None for one in held))

        block.register_forward_hook(watch)
    mean_hidden_states(model, stack, [[TokenChunk(list(range(40)), 1 / 40)]], padding=0)
    assert len(held) == 6
    assert most <= 2  # a block's output, and its input


class Twice(nn.Module):
    """A model that runs its first block twice."""

    def __init__(self, blocks: int, times: int, value: float = 1.0, flat: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.weight = nn.Parameter(torch.full((7, 4), value))
        self.times, self.flat = times, flat

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        states = self.weight[input_ids]
        states = states.reshape(-1, 4) if self.flat else states
        for _ in range(self.times):
            states = self.layers[0](states)
        for layer in self.layers[1:]:
            states = layer(states)
        return type("Output", (), {"last_hidden_state": states})()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Twice(3, 2), "must run the blocks of layers in order and once each"),
        (Twice(3, 0), "must run the blocks of layers in order and once each"),
        (Twice(2, 1, value=float("nan")), "hidden state 0 of 3 is not finite"),
        (Twice(2, 1, flat=True), "do not pass on one hidden state per token"),
    ],
)
def test_models_that_do_not_pass_on_hidden_states(model: Twice, text: str) -> None:
    stack = BlockStack("layers", tuple(model.layers))
    with pytest.raises(ns.MismatchError, match=text):
        mean_hidden_states(model, stack, [[TokenChunk([1, 2], 0.5)]], padding=0)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


def test_a_model_that_passes_on_hidden_states() -> None:
    model = Twice(2, 1, value=2.0)
    found = mean_hidden_states(
        model, BlockStack("layers", tuple(model.layers)), [[TokenChunk([1, 2], 0.5)]], padding=0
    )
    assert found.tolist() == [[2.0] * 4] * 3
