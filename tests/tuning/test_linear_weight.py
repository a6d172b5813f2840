"""Experts in one tensor: the gradient of their rows is that of plain autograd, however they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.moe  # it registers an operator that is used below
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tuning_support import batch, bits, put, rows_of, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")
E, IN, OUT, TOKENS = 5, 4, 6, 9
VISITS = torch.tensor([0, 0, 1, 1, 1, 3, 3, 4, 4])  # no token visits expert 2


class _Experts(nn.Module):
    """``[E, OUT, IN]``, or transposed ``[E, IN, OUT]``; and biases."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, IN, OUT) if transposed else torch.randn(E, OUT, IN))
        self.bias = nn.Parameter(torch.randn(E, OUT))
        self.run, self.transposed = run, transposed

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    @property
    def stack(self) -> Tensor:
        """``[E, IN, OUT]``."""
        return self.weight if self.transposed else self.weight.transpose(-2, -1)


def _one_by_one(self: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(TOKENS, OUT)
    for expert in VISITS.unique():
        (tokens,) = torch.where(expert == VISITS)
        if self.transposed:
            part = x[tokens] @ self.weight[expert] + self.bias[expert]
        else:
            part = functional.linear(x[tokens], self.weight[expert], self.bias[expert])
        part *= 2
        out.index_add_(0, tokens, part)
    return out


def _by_number(self: Any, x: Tensor) -> Tensor:
    parts = x.split(VISITS.bincount(minlength=E).tolist())
    weights = [self.weight[e].t() if not self.transposed else self.weight[e] for e in range(E)]
    return torch.cat(
        [torch.matmul(part.unsqueeze(0), w).squeeze(0) for part, w in zip(parts, weights, strict=True)]
    )


def _gathered(self: Any, x: Tensor) -> Tensor:
    if self.transposed:
        out = torch.bmm(x.unsqueeze(1), self.weight[VISITS]).squeeze(1)
    else:
        out = torch.bmm(self.weight[VISITS], x.unsqueeze(-1)).squeeze(-1)
    out.add_(self.bias[VISITS])
    return out


def _grouped(self: Any, x: Tensor) -> Tensor:
    offs = VISITS.bincount(minlength=E).cumsum(0).to(torch.int32)
    out = torch.ops.transformers.grouped_mm_fallback(x, self.stack, offs=offs)
    out.add_(self.bias[VISITS])
    return out


def _all_tokens(self: Any, x: Tensor) -> Tensor:
    return torch.bmm(x.expand(E, -1, -1), self.stack).sum(0)


def _all_tokens_left(self: Any, x: Tensor) -> Tensor:
    return (self.stack.mT @ x.expand(E, -1, -1).mT).sum(0).mT


def _otherwise(self: Any, x: Tensor) -> Tensor:
    """In ways that have no short cut."""
    some = torch.einsum("ti,eio->to", x, self.stack) + torch.einsum("ti,tio->to", x, self.stack[VISITS])
    some = some + x @ self.stack[[0, -1]][1] + x @ self.stack[-2]
    some = some + (x @ self.stack).sum(0) + (self.stack.mT @ x.t()).sum(0).t()  # broadcast
    return some + self.weight[VISITS].sum() * self.weight[3].sum()


RUNS = {run.__name__: run for run in (
    _one_by_one, _by_number, _gathered, _grouped, _all_tokens, _all_tokens_left, _otherwise
)}  # fmt: skip
# Along rows and columns, of some experts and not others; of experts as wholes; and of all experts alike.
PICKS = {
    "first": ([0, 1], [0, 3, 9, 19]), "second": ([0, 2], [0, 1, 17, 19]),
    "whole": ([0], [1, 2]), "shared": ([1], [2]),
}  # fmt: skip


def _backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out += 1
    (out * torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("picks", PICKS.values(), ids=PICKS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_product(run: Any, transposed: bool, picks: Any, mode: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(_Experts(run, transposed)).double(), torch.randn(TOKENS, IN).double()
    before, plain = bits(model.state_dict()), copy.deepcopy(model)
    chosen = {"0.weight": picks}
    if run in (_one_by_one, _gathered, _grouped):
        chosen["0.bias"] = ([0, 1], [0, 7, 29])
    attached = ns.attach(model, select(model, chosen), mode=mode)
    for _ in range(2):  # and then with other values
        plain.zero_grad()
        model.zero_grad()
        out, of_x = _backward(plain, x)
        mine, of_mine = _backward(model, x)
        torch.testing.assert_close(mine, out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_mine, of_x, rtol=1e-12, atol=1e-12)
        for name, (axes, index) in chosen.items():
            dense = vectors(plain.get_parameter(name).grad, axes, index)
            rows = rows_of(attached, name)
            torch.testing.assert_close(rows.grad, dense, rtol=1e-11, atol=1e-12)
            with torch.no_grad():
                rows.add_(0.1)
                put(plain.get_parameter(name), axes, index, rows)
    twin = copy.deepcopy(model)
    assert torch.equal(_backward(twin, x)[0], _backward(model, x)[0])
    attached.detach()
    assert bits(model.state_dict()) == before


@pytest.mark.parametrize("run", [_one_by_one, _gathered, _grouped, _all_tokens])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_gradient_of_the_whole_weight(run: Any, transposed: bool) -> None:
    """Nor of any part of it: nothing that the backward pass makes is as large as one expert."""
    model, x = nn.Sequential(_Experts(run, transposed)), torch.randn(TOKENS, IN, requires_grad=True)
    ns.attach(model, select(model, {"0.weight": ([0, 1], [0, 3, 9])}))
    made: list[tuple[str, int]] = []

    class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "bmm", "zeros", "new_zeros", "addmm"):
                made.append((str(func), out.numel()))
            return out

    loss = model(x).sum()
    with _Watch():
        loss.backward()
    assert made
    assert max(size for _, size in made) <= E * TOKENS * IN if run is _all_tokens else TOKENS * OUT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_token_visits_the_experts_with_rows(run: Any, mode: Any) -> None:
    """Their gradient is zero, and not missing: processes that train together wait for each other's."""
    if run in (_all_tokens, _all_tokens_left, _otherwise):
        return  # there, all are visited
    model, x = nn.Sequential(_Experts(run, False)), torch.randn(TOKENS, IN)
    attached = ns.attach(model, select(model, {"0.weight": ([0, 1], [12, 17])}), mode=mode)
    model(x).sum().backward()
    assert rows_of(attached, "0.weight").grad.abs().sum() == 0


@pytest.mark.parametrize("picks", [PICKS["first"], PICKS["second"]], ids=["first", "second"])
def test_autocast_where_the_product_has_none(picks: Any) -> None:
    model, x = nn.Sequential(_Experts(_grouped, False)), torch.randn(TOKENS, IN)
    plain = copy.deepcopy(model)
    rows = rows_of(ns.attach(model, select(model, {"0.weight": picks}), mode="overlay"), "0.weight")
    with torch.no_grad():
        put(plain.get_parameter("0.weight"), *picks, rows.add_(1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [_one_by_one, _gathered, _grouped])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_before_the_training(without: Any, run: Any, mode: Any) -> None:
    model, x = nn.Sequential(_Experts(run, False)).double(), torch.randn(TOKENS, IN).double()
    plain = copy.deepcopy(model)
    axes, index = PICKS["first"]
    attached = ns.attach(model, select(model, {"0.weight": (axes, index)}), mode=mode)
    with torch.no_grad():
        (rows,) = attached.parameters()
        rows.add_(0.1)
        put(plain.get_parameter("0.weight"), axes, index, rows)
    with without():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    _backward(plain, x)
    _backward(model, x)
    dense = vectors(plain.get_parameter("0.weight").grad, axes, index)
    torch.testing.assert_close(rows.grad, dense, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", [_one_by_one, _gathered, _grouped])
def test_checkpointing(run: Any, reentrant: bool) -> None:
    model, x = _Experts(run, False).double(), torch.randn(TOKENS, IN).double()
    attached = ns.attach(model, select(model, {"weight": PICKS["first"]}))
    _backward(model, x)
    (rows,) = attached.parameters()
    expected, rows.grad = rows.grad, None

    class _Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant).clone()

    _backward(_Checkpointed(), x)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [_one_by_one, _gathered, _grouped])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # torch of itself
def test_compiled(run: Any) -> None:
    torch.compiler.reset()
    model, x = _Experts(run, False).double(), torch.randn(TOKENS, IN).double()
    attached = ns.attach(model, select(model, {"weight": PICKS["first"]}))
    out, _ = _backward(model, x)
    (rows,) = attached.parameters()
    expected, rows.grad = rows.grad, None
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(_backward(compiled, x)[0], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, expected, rtol=1e-12, atol=1e-12)


SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 12,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "layer_types": ["full_attention"],
}  # fmt: skip
AXES = {"mixtral": (1, 1), "qwen3_moe": (1, 1), "gpt_oss": (2, 1), "llama4_text": (2, 1)}


def _mixture(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", AXES)
def test_a_mixture_of_experts(kind: str, implementation: str, mode: Any) -> None:
    """Of transformers, by all of its implementations: the logits, and the dense gradient's slice."""
    if kind == "llama4_text" and implementation != "eager":
        return  # it has one way
    model, (up, down) = _mixture(kind), AXES[kind]
    if kind != "llama4_text":
        model.set_experts_implementation(implementation)
    plain = copy.deepcopy(model)
    out = plain(**batch())
    out.loss.backward()
    picks: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            picks[name] = ([0, up], [0, 5, 25, 4 * parameter.shape[up] - 1])
        elif name.endswith("experts.down_proj"):
            axis = 3 - down  # its inputs, which are the units of the layer
            picks[name] = ([0, axis], [0, 5, 25, 4 * parameter.shape[axis] - 1])
        elif name.endswith("experts.gate_up_proj_bias"):
            picks[name] = ([0, 1], [0, 5, 25, 63])
    before = bits(model.state_dict())
    attached = ns.attach(model, select(model, picks), mode=mode, base=False)
    mine = model(**batch())
    torch.testing.assert_close(mine.logits, out.logits, rtol=1e-5, atol=1e-5)
    mine.loss.backward()
    for name, (axes, index) in picks.items():
        dense = vectors(plain.get_parameter(name).grad, axes, index)
        scale = float(dense.abs().max())
        assert scale > 0
        torch.testing.assert_close(rows_of(attached, name).grad, dense, rtol=0, atol=1e-5 * scale)
    torch.optim.SGD(attached.parameters(), lr=0.1).step()
    with attached.patch() as patch:
        assert patch.selection.neurons == sum(len(index) for _, index in picks.values())
    attached.detach()
    assert bits(model.state_dict()) == before
