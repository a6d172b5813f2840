"""Which parameters adapters of chosen neurons can have, and that whatever reads these finds the neurons."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_model import layers, llama, logits, mixtral, trained
from torch import Tensor, nn

from neftsurgery.errors import NeftError
from neftsurgery.peft.config import NeftConfig
from neftsurgery.peft.model import require_supported

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
X = torch.linspace(-1, 1, 48).view(2, 3, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attention(x, x, x)[0])
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0])
        return out


class Own(nn.Module):
    """The model has a parameter itself, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(3, 8))
        self.weights = nn.ParameterList([torch.randn(8, 8)])
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out((x + self.places) @ self.weights[0])
        return out


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.keys


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, max_norm=0.1)


def changed(model: Any, plain: nn.Module) -> nn.Module:
    """Change all neurons of an adapter, and write them into the plain model."""
    for name, weight in layers(model).items():
        rows, index = weight.neft_rows["default"], weight.neft_index["default"]
        with torch.no_grad():
            rows += torch.randn_like(rows)
            plain.get_parameter(name)[index] = rows.view(-1, *plain.get_parameter(name).shape[1:])
    return plain.eval()


@pytest.mark.parametrize(
    ("make", "chosen"),
    [
        (Attention, {"attention.out_proj.weight", "out.weight"}),
        (Recurrent, {"out.weight"}),
        (Own, {"out.weight"}),
        (lambda: nn.Sequential(Memory()), {"0.keys"}),
    ],
    ids=["attention", "recurrent", "own", "memory"],
)
def test_a_budget_takes_what_can_be_an_adapter(make: Any, chosen: set[str]) -> None:
    torch.manual_seed(0)
    plain = make().eval()
    model = get_peft_model(copy.deepcopy(plain), NeftConfig(params="100%"))
    assert layers(model).keys() == model.peft_config["default"].counts.keys() == chosen
    changed(model, plain)
    torch.testing.assert_close(model(X), plain(X))
    model.add_adapter("other", NeftConfig(params="100%"))  # and not the neurons of the first one
    assert model.peft_config["other"].counts == model.peft_config["default"].counts


@pytest.mark.parametrize(
    ("model", "name", "problem"),
    [
        (Attention(), "attention.in_proj_weight", "of a MultiheadAttention cannot be"),
        (Recurrent(), "lstm.weight_hh_l0", "of a LSTM cannot be"),
        (Own(), "places", "the model reads it itself"),
        (Own(), "weights.0", "of a ParameterList cannot be"),
        (Norm(), "table.weight", "norms that forbid it"),
    ],
    ids=["attention", "recurrent", "own", "list", "norm"],
)
def test_a_parameter_that_cannot_have_adapters_is_named(model: nn.Module, name: str, problem: str) -> None:
    with pytest.raises(NeftError, match=f"tensor {name}: .*{problem}"):
        require_supported(model, {name: (0,)})


def test_what_computes_with_the_weight_of_a_layer_finds_the_neurons() -> None:
    """In evaluation, torch's layers of transformers do not call the linear layers that they have."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    model = get_peft_model(copy.deepcopy(plain), NeftConfig(neurons=3, target_modules=["linear1"])).eval()
    before = model(X)
    changed(model, plain)
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X))
        assert not torch.allclose(model(X), before)
        with model.disable_adapter():
            torch.testing.assert_close(model(X), before)


def test_threads_that_share_a_model() -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Memory):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                assert go.wait(60)
            return super().forward(x)

    model = get_peft_model(nn.Sequential(Slow()), NeftConfig(neurons=3))
    changed(model, nn.Sequential(Memory()))
    found = [model(X)]
    thread = threading.Thread(target=lambda: found.append(model(X)))
    thread.start()
    assert entered.wait(60)
    found.append(model(X))
    go.set()
    thread.join()
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_a_replica_of_data_parallel_computes_with_its_own_weight() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6, bias=False)), NeftConfig(neurons=3))
    (layer,) = layers(model).values()
    replica, base = layer._replicate_for_data_parallel(), layer.base_layer._replicate_for_data_parallel()
    replica.base_layer, base.weight, base.bias = base, torch.zeros(6, 8), None
    rows, index = layer.neft_rows["default"], layer.neft_index["default"]
    torch.testing.assert_close(replica(X), torch.zeros(2, 3, 6).index_copy(2, index, X @ rows.t()))


def test_a_mixed_batch_where_a_weight_is_read_from_outside() -> None:
    model = get_peft_model(Attention(), NeftConfig(neurons=2, target_modules=["out_proj"])).eval()
    with pytest.raises(NeftError, match=r"tensor attention\.out_proj\.weight: examples cannot have adapters"):
        model(X, adapter_names=["__base__", "default"])


def test_an_adapter_along_another_axis_leaves_nothing_behind() -> None:
    model = get_peft_model(llama(), NeftConfig(neurons=9, target_modules=["down_proj"]))
    with pytest.raises(NeftError, match=r"down_proj\.weight: .* along other axes, \[0\], not \[1\]"):
        model.add_adapter("other", NeftConfig(params="10%", anatomy="ffn"))
    assert not any("other" in weight.neft_rows for weight in layers(model).values())


def test_an_adapter_that_is_added_while_another_is_merged_starts_from_the_base() -> None:
    base = llama()
    model = trained(get_peft_model(copy.deepcopy(base), NeftConfig(params="20%")))
    model.merge_adapter()
    model.add_adapter("other", NeftConfig(params="20%", policy="norm"))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(base))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: it is adapted twice
def test_a_layer_with_an_adapter_of_another_method_is_named() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    with pytest.raises(NeftError, match=r"tensor 0\.weight: .* adapter of another method"):
        get_peft_model(model.base_model.model, NeftConfig(neurons=2))


def test_modules_that_are_saved_whole() -> None:
    config = NeftConfig(params="20%", modules_to_save=["experts"])
    base = mixtral()
    model = trained(get_peft_model(copy.deepcopy(base), config))
    assert not any("experts" in name for name in config.counts)
    model.add_adapter("other", NeftConfig(params="100%"))
    assert not any("modules_to_save" in name for name in model.peft_config["other"].counts)
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before)
    assert [type(one) for one in merged.modules()] == [type(one) for one in base.modules()]


def test_a_budget_leaves_out_what_cannot_be_adapted() -> None:
    """The codes of quantized experts, and a convolution by channel; a file that names one is refused."""
    codes = nn.Parameter(torch.ones(2, 8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    parts = {"linear": nn.Linear(8, 8), "by_channel": nn.Conv1d(8, 8, 3, groups=8), "experts": nn.Module()}
    model = nn.ModuleDict(parts)
    model["experts"].register_parameter("gate_up_proj", codes)
    found = get_peft_model(copy.deepcopy(model), NeftConfig(neurons="100%"))
    assert layers(found).keys() == {"linear.weight"}
    for name, axes in (("by_channel.weight", [0]), ("experts.gate_up_proj", [0, 1])):
        with pytest.raises(NeftError, match=f"tensor {name}: "):
            get_peft_model(copy.deepcopy(model), NeftConfig(neurons=1, counts={name: [1, *axes]}))
