"""The autograd functions: what they save, what they give gradients to, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuning_support import select

import neftsurgery as ns
from neftsurgery.tuning.frozen_weights import (
    FrozenLinear,
    apply_function,
)

MODES = ("scatter", "overlay")


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_needed_is_saved(mode: Any) -> None:
    """For columns the chosen input features and no others; in evaluation nothing."""
    model, x = nn.Sequential(nn.Linear(50, 40)), torch.randn(60, 50)
    ns.attach(model, select(model, {"0.weight": ([1], [7, 8])}), mode="scatter")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
        assert [tuple(tensor.shape) for tensor in saved] == [(60, 2)]
        saved.clear()
        model(x.requires_grad_())
        assert [tuple(tensor.shape) for tensor in saved] == [(60, 2), (40, 50)]
        assert saved[1].data_ptr() == model[0].weight.data_ptr()
        saved.clear()
        with torch.no_grad():
            model(x)
        assert saved == []


def test_a_second_derivative_is_refused() -> None:
    """Not silently wrong: the backward pass is no function that is differentiated again."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(2, 3, requires_grad=True)
    ns.attach(model, select(model, {"0.weight": ([0], [1])}))
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


INDEX = torch.tensor([0, 2])
# function, the frozen weight, where the rows lie in it, the input, and the arguments after the weight
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "outputs": (FrozenLinear, (4, 3), 0, (5, 3), (None, INDEX, False, False)),
    "outputs, transposed": (FrozenLinear, (3, 4), 1, (5, 3), (None, INDEX, True, False)),
    "inputs": (FrozenLinear, (4, 3), 1, (5, 3), (None, INDEX, False, True)),
    "inputs, transposed": (FrozenLinear, (3, 4), 0, (5, 3), (None, INDEX, True, True)),
}


@pytest.mark.parametrize(("function", "shape", "axis", "inputs", "more"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_gradient_is_that_of_finite_differences(
    function: Any, shape: Any, axis: int, inputs: Any, more: Any
) -> None:
    """In float64, by torch's own check, of a function that puts the rows into the weight first."""
    torch.manual_seed(0)
    weight, x = torch.randn(shape).double(), torch.randn(inputs).double().requires_grad_()
    rows = weight.movedim(axis, 0)[INDEX].flatten(1).requires_grad_()

    def run(x: Tensor, rows: Tensor) -> Tensor:
        whole = weight.movedim(axis, 0).clone()
        whole[INDEX] = rows.detach().view(len(INDEX), *whole.shape[1:])
        return apply_function(function, x, rows, whole.movedim(0, axis), *more)

    assert torch.autograd.gradcheck(run, (x, rows))
