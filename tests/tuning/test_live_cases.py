"""What people do with a model in training: right against plain torch, or refused by the tensor's name.

The oracle is a plain model whose other neurons get no gradient. docs/training.md has a table of these cases.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from tuning_support import FAMILIES, Picks, batch, llama, put, rows_of, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")
DOCS = Path(__file__).resolve().parents[2] / "docs"
LLAMA = FAMILIES["llama"][1]
UP = "model.layers.0.mlp.up_proj.weight"
PICKS: Picks = {"0.weight": ([0], [1, 3]), "0.bias": ([0], [0]), "2.weight": ([1], [0, 4])}

Step = Callable[[], Any]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def masked(model: nn.Module, picks: Picks) -> nn.Module:
    """The oracle: of all parameters, only the chosen neurons get a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in picks)
        if name in picks:
            axes, index = picks[name]
            mask = torch.zeros_like(parameter)
            put(mask, axes, index, torch.ones_like(vectors(mask, axes, index)))
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
    return model


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().sum()


def assert_alike(attached: ns.Attached, oracle: nn.Module, picks: Picks) -> None:
    for name, (axes, index) in picks.items():
        expected = vectors(oracle.get_parameter(name).detach(), axes, index)
        torch.testing.assert_close(rows_of(attached, name).detach(), expected, rtol=1e-5, atol=1e-6)


def compare(mode: Any, make_step: Callable[[nn.Module, list[nn.Parameter]], Callable[[int], Any]]) -> None:
    """Three steps of both models, with the same loss before each and at the end."""
    oracle, model = masked(small(), PICKS), small()
    start = copy.deepcopy(oracle)
    attached = ns.attach(model, select(model, PICKS), mode=mode)
    trained = [parameter for parameter in oracle.parameters() if parameter.requires_grad]
    steps = make_step(oracle, trained), make_step(model, list(attached.parameters()))
    for seed in range(3):
        torch.testing.assert_close(loss_of(model, seed), loss_of(oracle, seed))
        for step in steps:
            step(seed)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, 9), loss_of(oracle, 9))
        assert (loss_of(oracle, 9) - loss_of(start, 9)).abs() > 0.1
    assert_alike(attached, oracle, PICKS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself
def test_a_compiled_optimizer_step(mode: Any) -> None:
    torch.compiler.reset()

    def make_step(model: nn.Module, trained: list[nn.Parameter]) -> Callable[[int], Any]:
        optimizer = torch.optim.Adam(trained, lr=0.1)
        compiled = torch.compile(optimizer.step, backend="aot_eager")

        def step(seed: int) -> None:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            compiled()

        return step

    compare(mode, make_step)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_whole_step_compiled(mode: Any) -> None:
    torch.compiler.reset()

    def make_step(model: nn.Module, trained: list[nn.Parameter]) -> Callable[[int], Any]:
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)

        def step(seed: int) -> None:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()

        return torch.compile(step, backend="aot_eager")

    compare(mode, make_step)


def flat_buffer(trained: list[nn.Parameter]) -> Step:
    """As DeepSpeed and apex do: the parameters' data are views of one buffer, which alone is changed."""
    buffer = torch.cat([parameter.detach().flatten() for parameter in trained])
    start = 0
    for parameter in trained:
        parameter.data = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()

    def step() -> None:
        buffer.add_(torch.cat([p.grad.flatten() for p in trained]), alpha=-0.1)  # type: ignore[union-attr]

    return step


def assigned_data(trained: list[nn.Parameter]) -> Step:
    """As zeroth-order optimizers do."""

    def step() -> None:
        for parameter in trained:
            parameter.data = parameter.data - 0.1 * parameter.grad  # type: ignore[operator]

    return step


def changed_data(trained: list[nn.Parameter]) -> Step:
    def step() -> None:
        for parameter in trained:
            parameter.data.add_(parameter.grad, alpha=-0.1)  # type: ignore[arg-type]

    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make_optimizer", [flat_buffer, assigned_data, changed_data])
def test_an_optimizer_that_torch_does_not_see(mode: Any, make_optimizer: Any) -> None:
    def make_step(model: nn.Module, trained: list[nn.Parameter]) -> Callable[[int], Any]:
        change = make_optimizer(trained)

        def step(seed: int) -> None:
            for parameter in trained:
                parameter.grad = None
            loss_of(model, seed).backward()
            change()

        return step

    compare(mode, make_step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself
def test_a_compiled_model_whose_values_change_unseen(mode: Any) -> None:
    torch.compiler.reset()

    def make_step(model: nn.Module, trained: list[nn.Parameter]) -> Callable[[int], Any]:
        compiled, change = torch.compile(model, backend="aot_eager", fullgraph=True), flat_buffer(trained)

        def step(seed: int) -> None:
            for parameter in trained:
                parameter.grad = None
            loss_of(compiled, seed).backward()
            change()

        return step

    compare(mode, make_step)


@pytest.mark.parametrize("mode", MODES)
def test_functional_call(mode: Any) -> None:
    """With other values: outputs and gradients are a plain model's; then its own values count again."""
    model, oracle, x = small(), small(), torch.randn(6, 4)
    attached = ns.attach(model, select(model, PICKS), mode=mode)
    for turn in (1.0, 2.0, 1.0):
        others = {n: (p.detach() + turn).requires_grad_() for n, p in attached.named_parameters()}
        plain = {n: p.detach().clone() for n, p in oracle.named_parameters()}
        for name, (axes, index) in PICKS.items():
            put(plain[name], axes, index, vectors(plain[name], axes, index) + turn)
        plain = {name: tensor.requires_grad_() for name, tensor in plain.items()}
        out, expected = functional_call(model, others, x), functional_call(oracle, plain, x)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for name, (axes, index) in PICKS.items():
            (mine,) = [other for key, other in others.items() if key.startswith(f"{name}_neurons_")]
            torch.testing.assert_close(mine.grad, vectors(plain[name].grad, axes, index))
        torch.testing.assert_close(model(x), oracle(x))


def test_functional_call_with_another_weight() -> None:
    model = small()
    ns.attach(model, select(model, PICKS))
    with pytest.raises(ns.UsageError, match=r"tensor 0\.\w+: the weight was replaced"):
        functional_call(model, {n: p.detach() for n, p in model.named_parameters()}, torch.randn(6, 4))


@pytest.mark.parametrize("mode", MODES)
def test_loading_a_plain_state(mode: Any) -> None:
    """The model computes with what was loaded, as a plain one does; `detach` still undoes all."""
    model, tuned = llama(), llama()
    for parameter in tuned.parameters():
        parameter.data += 0.1
    attached = ns.attach(model, select(model, LLAMA), mode=mode)
    assert not model.load_state_dict(tuned.state_dict()).missing_keys
    torch.testing.assert_close(model(**batch()).logits, tuned(**batch()).logits)
    for name, (axes, index) in LLAMA.items():
        expected = vectors(tuned.get_parameter(name).detach(), axes, index)
        assert torch.equal(rows_of(attached, name).detach(), expected)
    attached.detach()
    for name, (axes, index) in LLAMA.items():
        now, old = model.get_parameter(name), llama().get_parameter(name)
        assert torch.equal(vectors(now, axes, index), vectors(old, axes, index))


@pytest.mark.parametrize("mode", MODES)
def test_going_back_to_an_earlier_state(mode: Any) -> None:
    """As early stopping does."""
    model = small()
    attached = ns.attach(model, select(model, PICKS), mode=mode)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()

    step()
    best, expected = {n: t.clone() for n, t in model.state_dict().items()}, loss_of(model, 9)
    step()
    assert not torch.equal(loss_of(model, 9), expected)
    model.load_state_dict(best)
    assert torch.equal(loss_of(model, 9), expected)


@pytest.mark.parametrize("when", ["step", "patch"])
def test_a_module_that_is_replaced(when: str) -> None:
    model = small()
    attached = ns.attach(model, select(model, PICKS))
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    model[2] = nn.Linear(5, 3)
    loss_of(model, 0).backward()
    with pytest.raises(ns.UsageError, match=r"tensor 2\.weight: the module was replaced"):
        optimizer.step() if when == "step" else attached.patch()


def test_a_module_that_is_wrapped_is_still_there() -> None:
    model = small()
    attached = ns.attach(model, select(model, PICKS))
    model[2] = nn.Sequential(model[2])
    loss_of(model, 0).backward()
    torch.optim.SGD(attached.parameters(), lr=0.1).step()
    attached.patch().close()


def test_values_that_are_not_finite() -> None:
    model = llama().to(torch.float16)
    attached = ns.attach(model, select(model, {UP: ([0], [1, 5, 7])}))
    with torch.no_grad():
        next(attached.parameters())[1, 3] = 1e6  # finite in float32
    with pytest.raises(ns.MismatchError, match=rf"tensor {UP}: .*not finite.*in 1 of 3 neurons"):
        attached.patch()
    with torch.no_grad():
        next(attached.parameters())[1, 3] = torch.nan
    with pytest.raises(ns.MismatchError, match="not finite"):
        attached.patch()


def test_a_model_that_is_cast() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    model.to(torch.bfloat16)
    with pytest.raises(ns.UsageError, match=rf"tensor {UP}: the model was cast"):
        attached.patch()


def test_parameters_that_are_trained_besides(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    attached.patch().close()
    assert not caplog.records
    model.model.norm.weight.requires_grad_(True)
    attached.patch().close()
    assert "model.norm.weight" in caplog.messages[0]
    optimizer = torch.optim.SGD([*attached.parameters(), model.model.norm.weight], lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    model.model.norm.weight.requires_grad_(False)
    attached.patch().close()
    assert "model.norm.weight" in caplog.messages[1]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_after_attach(caplog: pytest.LogCaptureFixture) -> None:
    """It freezes the neurons, which is said."""
    config = LoraConfig(target_modules=["q_proj"])
    model = llama()
    ns.attach(model, select(model, {UP: ([0], [1])}))
    get_peft_model(model, config).train()(**batch()).loss.backward()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert UP in said
    assert "do not train" in said


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_attach_to_what_a_wrapper_has_already() -> None:
    """Neither DDP nor FSDP would reduce the gradients of parameters that come later."""
    model = small()
    selection = select(model, PICKS)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ns.UsageError, match="DistributedDataParallel has the model already"):
        ns.attach(model, selection)
    with pytest.raises(ns.UsageError, match="DistributedDataParallel has the model already"):
        ns.attach(model[0], select(model[0], {"weight": ([0], [1])}))
    del wrapped
    ns.attach(model, selection).detach()
    fully_shard(model)
    with pytest.raises(ns.UsageError, match="fully_shard has the model already"):
        ns.attach(model, selection, mode="overlay")


@pytest.mark.usefixtures("one_process")
def test_a_part_that_is_not_sharded() -> None:
    """Its gradient is not reduced, where that of the rest is."""
    model = small()
    attached = ns.attach(model, select(model, PICKS), mode="overlay")
    fully_shard(model[0])
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(ns.UsageError, match=r"tensor 2\.weight: the gradient .* is not reduced"):
        optimizer.step()


@pytest.mark.usefixtures("one_process")
def test_a_weight_that_is_read_under_fsdp() -> None:
    """Its neurons would not train: FSDP puts its own weight in the place of the one that carries them."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * self.scale)

    model = Reader()
    selection = select(model, {"scale": ([0], [1]), "layer.weight": ([0], [2])})
    attached = ns.attach(model, selection, mode="overlay")
    fully_shard(model)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(ns.UsageError, match=r"tensor scale: the model reads this weight itself"):
        optimizer.step()


def test_values_that_are_replaced() -> None:
    model = small()
    attached = ns.attach(model, select(model, PICKS), mode="overlay")
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    loss_of(model, 0).backward()
    with pytest.raises(ns.UsageError, match=r"tensor 0\.\w+: the optimizer trains .* replaced"):
        optimizer.step()


def test_the_table_names_tests_that_there_are() -> None:
    tests, page = Path(__file__).parents[1], (DOCS / "training.md").read_text()
    rows = re.findall(r"`(?:(\w+)/)?(test_\w+\.py)(?:::(test_\w+))?` \|$", page, re.M)
    assert len(rows) > 30
    for folder, file, name in rows:
        assert f"def {name}(" in (tests / (folder or "tuning") / file).read_text() or not name, name


@pytest.mark.parametrize("mode", MODES)
def test_an_average_of_the_weights(mode: Any) -> None:
    """As EMA and SWA do: the copy computes with averaged values."""

    def trained(model: nn.Module, parameters: Any) -> nn.Module:
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
            average.update_parameters(model)
        return average

    model, oracle = small(), masked(small(), PICKS)
    attached = ns.attach(model, select(model, PICKS), mode=mode)
    mine, expected = trained(model, attached.parameters()), trained(oracle, oracle.parameters())
    torch.testing.assert_close(loss_of(mine, 9), loss_of(expected, 9))
