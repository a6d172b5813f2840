"""A weight carries its neurons whoever reads it: gradients are the dense gradient's slice, in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tuning_support import bits, own_state, put, rows_of, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")


class _Reads(nn.Module):
    """Its forward pass is ``run(self, x)``: a parent that reads what its child holds."""

    def __init__(self, child: nn.Module, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.child, self.run = child, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Token(nn.Module):
    """A plain parameter, added to in place as vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.table = nn.Parameter(torch.randn(6, 4))
        self.many = nn.ParameterList([torch.randn(3, 4), torch.randn(5, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x += self.table[: x.shape[1]]
        return x @ self.many[1].mT + torch.einsum("btd,nd->bt", x, self.many[0]).unsqueeze(-1)


class _Product(torch.autograd.Function):
    """As other libraries' kernels: torch does not ask a weight before it is given to one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def _attention(**options: Any) -> nn.Module:
    return _Reads(nn.MultiheadAttention(6, 2, batch_first=True, **options), lambda m, x: m.child(x, x, x)[0])


def _first(module: nn.Module) -> nn.Module:
    return _Reads(module, lambda m, x: m.child(x)[0])


def _tied() -> nn.Module:
    return _Reads(nn.Embedding(7, 4), lambda m, x: functional.linear(torch.tanh(m.child(x)), m.child.weight))


IDS = torch.tensor([[0, 3, 3, 6], [5, 0, 6, 6]])
OLD = torch.nn.utils.weight_norm
NEW = torch.nn.utils.parametrizations.weight_norm
WEIGHT, BIAS = "child.weight", "child.bias"
# module, input (ids or a shape), picks
MODULES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "a parent's linear": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: functional.linear(x, m.child.weight, m.child.bias)),
        (2, 3, 5), {WEIGHT: ([0], [0, 6]), BIAS: ([0], [1, 6])},
    ),
    "a parent's linear, columns": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: functional.linear(x, m.child.weight)),
        (2, 3, 5), {WEIGHT: ([1], [0, 4])},
    ),
    "a parent's product": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: x @ m.child.weight.T + m.child(x)),
        (3, 5), {WEIGHT: ([0], [2, 6]), BIAS: ([0], [2])},
    ),
    "a parent's convolution": (
        lambda: _Reads(
            nn.Conv1d(4, 4, 3, groups=4),
            lambda m, x: functional.conv1d(x, m.child.weight.view(4, 1, 3), m.child.bias, groups=4),
        ),
        (2, 4, 6), {WEIGHT: ([0], [0, 3]), BIAS: ([0], [2])},
    ),
    "another library's kernel": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: _Product.apply(x, m.child.weight)),
        (3, 5), {WEIGHT: ([0], [0, 6])},
    ),
    "another library's operator": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: torch.ops.aten.linear.default(x, m.child.weight)),
        (3, 5), {WEIGHT: ([0], [0, 6])},
    ),
    "an extended forward": (
        lambda: _Reads(_Scaled(5, 7), lambda m, x: m.child(x)), (3, 5), {WEIGHT: ([0], [1])}
    ),
    "single elements": (
        lambda: _Reads(nn.Linear(5, 7), lambda m, x: m.child(x)), (3, 5),
        {WEIGHT: ([0, 1], [0, 17, 34]), BIAS: ([0], [3])},
    ),
    "a transposed convolution 1-D": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2)), (2, 4, 5),
        {"0.weight": ([1], [0, 5]), "0.bias": ([0], [5])},
    ),
    "a transposed convolution 2-D": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2)), (2, 4, 3, 4),
        {"0.weight": ([0, 1], [0, 11])},
    ),
    "a transposed convolution 3-D": (
        lambda: nn.Sequential(nn.ConvTranspose3d(2, 3, 2)), (1, 2, 3, 2, 2), {"0.weight": ([1], [2])},
    ),
    "a circular convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")), (2, 4, 5),
        {"0.weight": ([0], [0, 5]), "0.bias": ([0], [5])},
    ),
    "a lopsided convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, padding="same")), (2, 4, 5), {"0.weight": ([0], [0, 5])},
    ),
    "a grouped convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), (2, 4, 5), {"0.weight": ([0], [0, 5])},
    ),
    "input channels": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3)), (2, 4, 5), {"0.weight": ([1], [0, 3])}),
    "LSTM": (
        lambda: _first(nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)), (2, 5, 4),
        {"child.weight_ih_l0": ([0], [0, 11]), "child.weight_hh_l1_reverse": ([0], [3]),
         "child.bias_hh_l0": ([0], [4])},
    ),
    "GRU": (lambda: _first(nn.GRU(4, 3)), (5, 2, 4), {"child.weight_hh_l0": ([1], [0, 2])}),
    "LSTM cell": (lambda: _first(nn.LSTMCell(4, 3)), (2, 4), {"child.weight_ih": ([0], [0, 11])}),
    "attention": (
        _attention, (2, 5, 6),
        {"child.in_proj_weight": ([0], [0, 7, 17]), "child.in_proj_bias": ([0], [1, 13]),
         "child.out_proj.weight": ([1], [0, 5]), "child.out_proj.bias": ([0], [2])},
    ),
    "attention, apart": (
        lambda: _attention(kdim=6, vdim=6, add_bias_kv=True), (2, 5, 6),
        {"child.in_proj_weight": ([0], [0, 7])},
    ),
    "weight norm": (
        lambda: nn.Sequential(NEW(nn.Linear(5, 7))), (3, 5),
        {"0.parametrizations.weight.original0": ([0], [0, 6]),
         "0.parametrizations.weight.original1": ([0], [0, 3]), "0.bias": ([0], [2])},
    ),
    "weight norm of old": (
        lambda: nn.Sequential(OLD(nn.Conv1d(4, 6, 3))), (2, 4, 5),
        {"0.weight_g": ([0], [0, 5]), "0.weight_v": ([0], [1, 5]), "0.bias": ([0], [3])},
    ),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(2, 6)), (3, 6),
        {"0.weight": ([0], [0, 5]), "0.bias": ([0], [1]), "1.weight": ([0], [3])},
    ),
    "plain parameters": (
        _Token, (2, 3, 4),
        {"token": ([2], [0, 3]), "table": ([0], [0, 3]), "many.0": ([0], [2]), "many.1": ([1], [1])},
    ),
    "an embedding's columns": (lambda: nn.Sequential(nn.Embedding(7, 4)), IDS, {"0.weight": ([1], [0, 3])}),
    "an embedding by frequency": (
        lambda: nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True)), IDS,
        {"0.weight": ([0], [0, 3, 5])},
    ),
    "a sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True)), IDS, {"0.weight": ([0], [0, 1, 3, 5])},
    ),
    "a bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 4)), IDS, {"0.weight": ([0], [0, 3, 4])}),
    "bilinear": (
        lambda: _Reads(nn.Bilinear(3, 4, 5), lambda m, x: m.child(x[..., :3], x[..., 3:])), (2, 7),
        {WEIGHT: ([0, 2], [0, 7, 19])},
    ),
    "tied": (_tied, IDS, {WEIGHT: ([0], [0, 2, 3])}),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The module in float64, its input and the picks."""
    make, given, picks = MODULES[name]
    torch.manual_seed(0)
    model = make().double()
    return model, given if isinstance(given, Tensor) else torch.randn(given).double(), picks


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output, changed in place as models do, after a backward pass; and the input's gradient."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    out = model(x)
    out += 1
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Using padding:UserWarning")
def test_every_module(name: str, mode: Any) -> None:
    model, x, picks = made(name)
    before, held = bits(model.state_dict()), [set(vars(module)) for module in model.modules()]
    twin = made(name)[0]
    out, of_x = run(twin, x)
    dense = {key: parameter.grad for key, parameter in twin.named_parameters()}
    attached = ns.attach(model, select(model, picks), mode=mode)
    for _ in range(2):  # what autograd keeps between passes is used again
        model.zero_grad()
        mine, of_mine = run(model, x)
    torch.testing.assert_close(mine, out, rtol=1e-12, atol=1e-12)
    if of_x is not None:
        torch.testing.assert_close(of_mine, of_x, rtol=1e-12, atol=1e-12)
    for key, (axes, index) in picks.items():
        gradient = dense[key].to_dense()
        torch.testing.assert_close(
            rows_of(attached, key).grad, vectors(gradient, axes, index), rtol=1e-10, atol=1e-12
        )
    assert bits(own_state(model)) == before
    _check_new_values(name, model, attached)
    attached.detach()
    assert bits(model.state_dict()) == before
    assert [set(vars(module)) for module in model.modules()] == held
    torch.testing.assert_close(run(model, x)[0], out, rtol=0, atol=0)


def _check_new_values(name: str, model: nn.Module, attached: ns.Attached) -> None:
    """Changed values count in the next pass; a copy of the model has its own."""
    plain, x, picks = made(name)
    with torch.no_grad():
        for key, (axes, index) in picks.items():
            rows = rows_of(attached, key)
            rows.add_(0.1)
            put(plain.get_parameter(key), axes, index, rows)
    out, _ = run(plain, x)
    torch.testing.assert_close(run(model, x)[0], out, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x) + 1, out, rtol=1e-12, atol=1e-12)
    if name == "weight norm of old":
        return  # torch cannot copy it
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.sub_(0.1)
    torch.testing.assert_close(run(twin, x)[0], out, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is not None for key, parameter in twin.named_parameters() if "_neurons" in key)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(mode: Any, reentrant: bool) -> None:
    for name in ("a parent's linear", "attention", "plain parameters", "another library's kernel"):
        model, x, picks = made(name)
        attached = ns.attach(model, select(model, picks), mode=mode)
        run(model, x)
        expected = [parameter.grad for parameter in attached.parameters()]
        model.zero_grad()
        run(_Reads(model, lambda m, x: checkpoint(m.child, x, use_reentrant=reentrant).clone()), x)
        for parameter, gradient in zip(attached.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["a parent's linear", "a parent's product", "attention", "plain parameters", "tied"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # torch of itself
def test_compiled(name: str, mode: Any) -> None:
    torch.compiler.reset()
    model, x, picks = made(name)
    attached = ns.attach(model, select(model, picks), mode=mode)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        out, _ = run(model, x)
        expected = [parameter.grad for parameter in attached.parameters()]
        model.zero_grad()
        torch.testing.assert_close(run(compiled, x)[0], out, rtol=1e-12, atol=1e-12)
        for parameter, gradient in zip(attached.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
        torch.optim.SGD(attached.parameters(), lr=0.1).step()
        model.zero_grad()


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: Any) -> None:
    """As far from the dense gradient as bfloat16 takes it."""
    for name in ("a parent's linear", "a parent's product", "attention"):
        model, x, picks = made(name)
        model, x = model.float(), x.float()
        twin = copy.deepcopy(model)
        attached = ns.attach(model, select(model, picks), mode=mode)
        with torch.autocast("cpu", torch.bfloat16):
            run(twin, x)
            run(model, x)
        for key, (axes, index) in picks.items():
            gradient, dense = rows_of(attached, key).grad, vectors(twin.get_parameter(key).grad, axes, index)
            assert gradient.dtype == torch.float32
            assert (gradient - dense).norm() <= 0.05 * dense.norm()


def test_what_the_weight_says_of_itself() -> None:
    """What the parameter says; and it is changed through it."""
    model = nn.Sequential(nn.Linear(3, 4))
    parameter = model[0].weight
    attached = ns.attach(model, select(model, {"0.weight": ([0], [1])}))
    weight: Any = model[0].weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type, len(weight)) == ((4, 3), torch.float32, "cpu", 4)
    assert weight.requires_grad
    assert weight.data_ptr() == parameter.data_ptr()
    model.to(torch.bfloat16)
    assert (weight.dtype, weight.element_size()) == (torch.bfloat16, 2)
    nn.init.constant_(weight, 2)
    weight.data[0] = 3
    with torch.no_grad():
        weight[2:] += 1
        weight.mul_(2)
    assert parameter.sum(1)[[0, 2, 3]].tolist() == [18, 18, 18]  # the neuron keeps its values
    assert model.get_parameter("0.weight") is weight
    model[0].weight = weight  # as tying weights does
    attached.detach()
    assert model[0].weight is parameter
    assert model._modules["0"]._parameters["weight"] is parameter


def test_a_model_that_is_dropped_is_freed() -> None:
    model, x, picks = made("a parent's linear")
    ns.attach(model, select(model, picks))
    run(model, x)
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert not any(module() for module in gone)


def test_patches_over_a_weight_that_its_parent_reads() -> None:
    """Overlaid by a patch, and trained over another patch."""
    model, x, picks = made("a parent's linear")
    attached = ns.attach(model, select(model, picks), base=False)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.mul_(2)
    out, _ = run(model, x)
    with attached.patch() as patch:
        attached.detach()
        below = ns.attach(model, patch, mode="overlay")
        assert torch.equal(model(x) + 1, out)
        above = ns.attach(model, select(model, {WEIGHT: ([0], [3])}), mode="overlay")
        run(model, x)
        assert rows_of(above, WEIGHT).grad.abs().sum() > 0
        above.detach()
        assert torch.equal(model(x) + 1, out)
        below.detach()
        assert not torch.equal(model(x) + 1, out)
