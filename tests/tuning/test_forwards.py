"""The gradient of the chosen neurons is the dense gradient's slice: any mode, layer type and kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from tuning_support import FAMILIES, batch, rows_of, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
# layer, input shape, picks: none of the weights is square
LAYERS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "linear rows, 2-D": (lambda: nn.Linear(5, 7), (4, 5), {"weight": ([0], [0, 3, 6])}),
    "linear rows, 3-D": (lambda: nn.Linear(5, 7), (2, 3, 5), {"weight": ([0], [2])}),
    "linear rows, 1-D": (lambda: nn.Linear(5, 7), (5,), {"weight": ([0], [2, 4])}),
    "linear rows, no bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5), {"weight": ([0], [1, 2])}),
    "linear rows and bias": (
        lambda: nn.Linear(5, 7), (2, 3, 5), {"weight": ([0], [1, 2]), "bias": ([0], [2, 5])}
    ),
    "linear columns, 2-D": (lambda: nn.Linear(5, 7), (4, 5), {"weight": ([1], [0, 4])}),
    "linear columns, 3-D, and bias": (
        lambda: nn.Linear(5, 7), (2, 3, 5), {"weight": ([1], [3]), "bias": ([0], [0, 6])}
    ),
    "linear, bias alone": (lambda: nn.Linear(5, 7), (2, 3, 5), {"bias": ([0], [0, 6])}),
    "linear, all rows": (lambda: nn.Linear(5, 7), (2, 3, 5), {"weight": ([0], range(7))}),
    "Conv1D outputs, 2-D": (lambda: Conv1D(7, 5), (4, 5), {"weight": ([1], [0, 6])}),
    "Conv1D outputs, 3-D, and bias": (
        lambda: Conv1D(7, 5), (2, 3, 5), {"weight": ([1], [0, 6]), "bias": ([0], [0, 1])}
    ),
    "Conv1D inputs": (lambda: Conv1D(7, 5), (2, 3, 5), {"weight": ([0], [1, 4])}),
    "convolution 1-D": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9),
        {"weight": ([0], [0, 5]), "bias": ([0], [1])},
    ),
    "convolution 2-D": (
        lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding="valid"), (2, 4, 9, 8), {"weight": ([0], [4])}
    ),
    "convolution 2-D, same": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 5, 6), {"weight": ([0], [1, 2])}
    ),
    "convolution, unbatched": (lambda: nn.Conv1d(4, 6, 3), (4, 9), {"weight": ([0], [0, 5])}),
}  # fmt: skip


def dense(layer: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient and weight gradients of an ordinary layer."""
    twin, x = copy.deepcopy(layer), x.clone().requires_grad_()
    out = twin(x)
    (out * weights).sum().backward()
    return out.detach(), x.grad, {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("make", "shape", "picks"), LAYERS.values(), ids=LAYERS)
def test_a_layer(make: Any, shape: tuple[int, ...], picks: Any, dtype: torch.dtype, mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make().to(dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Conv1D's are zero
            nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=dtype)
    weights = torch.randn_like(model(x))
    out, of_x, of_weights = dense(model, x, weights)
    attached = ns.attach(model, select(model, {f"0.{n}": pick for n, pick in picks.items()}), mode=mode)
    assert all(p.dtype == torch.float32 for p in attached.parameters())
    x.requires_grad_()
    mine = model(x)
    if mode == "scatter":
        assert torch.equal(mine, out)
    torch.testing.assert_close(mine, out, **TOLERANCE[dtype])
    mine += 1  # as some models do
    (mine * weights).sum().backward()
    torch.testing.assert_close(x.grad, of_x, **TOLERANCE[dtype])
    for name, (axes, index) in picks.items():
        expected = vectors(of_weights[f"0.{name}"], axes, index).float()
        torch.testing.assert_close(rows_of(attached, f"0.{name}").grad, expected, **TOLERANCE[dtype])
    trained = {name.rpartition("_")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"0.{name}_neurons" for name in picks}


def test_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), torch.randn(2, 4, 9)
    weights = torch.randn_like(model(x))
    _, _, gradients = dense(model, x, weights)
    attached = ns.attach(model, select(model, {"0.weight": ([0], [1, 4])}))
    (model(x) * weights).sum().backward()
    torch.testing.assert_close(
        rows_of(attached, "0.weight").grad, vectors(gradients["0.weight"], [0], [1, 4]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding(mode: Any, padding: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, padding_idx=padding))
    ids = torch.tensor([[0, 3, 3, 7], [10, 0, 7, 7]])
    weights = torch.randn(2, 4, 4)
    (model(ids) * weights).sum().backward()
    expected = vectors(model[0].weight.grad, [0], [0, 3, 5, 7])
    out = model(ids).detach()
    attached = ns.attach(model, select(model, {"0.weight": ([0], [0, 3, 5, 7])}), mode=mode)
    assert model[0].weight.grad is None
    mine = model(ids)
    assert torch.equal(mine, out)
    (mine * weights).sum().backward()
    torch.testing.assert_close(rows_of(attached, "0.weight").grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model(family: str, mode: Any) -> None:
    """Of real transformers, tied weights included: their gradient is that of all their uses."""
    make, picks = FAMILIES[family]
    model = make()
    twin = copy.deepcopy(model)
    loss = twin(**batch()).loss
    loss.backward()
    attached = ns.attach(model, select(model, picks), mode=mode)
    mine = model(**batch()).loss
    torch.testing.assert_close(mine, loss, rtol=1e-6, atol=1e-6)
    mine.backward()
    assert len(list(attached.parameters())) == len(picks)
    for name, (axes, index) in picks.items():
        expected = vectors(twin.get_parameter(name).grad, axes, index)
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(rows_of(attached, name).grad, expected, rtol=0, atol=1e-5 * scale)


class _Twice(nn.Module):
    """Calls a module twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(input=self.first(x))))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_module_called_twice_and_by_keyword(mode: Any, axis: int) -> None:
    torch.manual_seed(0)
    model, x = _Twice(), torch.randn(4, 3)
    _, _, gradients = dense(model, x, torch.ones(4, 2))
    attached = ns.attach(model, select(model, {"inner.weight": ([axis], [1, 4])}), mode=mode)
    model(x).sum().backward()
    torch.testing.assert_close(
        rows_of(attached, "inner.weight").grad, vectors(gradients["inner.weight"], [axis], [1, 4])
    )
