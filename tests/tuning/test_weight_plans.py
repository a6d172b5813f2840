"""A selection that does not fit is refused with a clear error, before anything changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tuning_support import bits, gpt2, llama, rows_of, saved, select

import neftsurgery as ns
from neftsurgery.neurons.layout import Layout
from neftsurgery.selection.selection import Chosen
from neftsurgery.tensors.header import TensorInfo

UP = "model.layers.0.mlp.up_proj.weight"


def selection(
    name: str, shape: tuple[int, ...], axes: tuple[int, ...], index: list[int], kind: str = "F32"
) -> Any:
    chosen = Chosen(TensorInfo(name, kind, shape), Layout(shape, axes), np.array(index, np.int64))
    return ns.Selection({name: chosen}, {})


MISSING = "model.layers.7.mlp.up_proj.weight"
FIT, USE = ns.MismatchError, ns.UsageError

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no such tensor": (selection(MISSING, (24, 16), (0,), [1]), FIT, "no such weight"),
    "another shape": (selection(UP, (24, 17), (0,), [1]), FIT, r"expected \[24, 17\], found \[24, 16\]"),
    "codes": (selection(UP, (24, 16), (0,), [1], "F8_E4M3"), FIT, "found F8_E4M3"),
    "wider than the model": (
        selection(UP, (24, 16), (0,), [1], "F64"),
        FIT,
        "expected F64, found torch.float32",
    ),
    "narrower than its values": (selection(UP, (24, 16), (0,), [1], "BF16"), FIT, "BF16 cannot hold"),
    "nothing": (ns.Selection({}, {}), FIT, "no neuron is chosen"),
    "no selection": (7, USE, "takes a Selection or a Patch"),
    "no file": ("up_proj", USE, "no such file"),
}


@pytest.mark.parametrize(("what", "error", "says"), WRONG.values(), ids=WRONG)
def test_a_selection_that_does_not_fit(what: Any, error: type[Exception], says: str) -> None:
    model = llama()
    before = bits(model.state_dict())
    with pytest.raises(error, match=says) as caught:
        ns.attach(model, what)
    if isinstance(what, ns.Selection) and what.tensors:
        assert next(iter(what.tensors)) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert bits(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())
    assert not any("_neurons" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_the_second_tensor_is_wrong() -> None:
    """Nothing of the first is attached either."""
    model = llama()
    good = select(model, {UP: ([0], [1])})
    bad = selection("model.norm.weight", (17,), (0,), [1])
    with pytest.raises(ns.MismatchError):
        ns.attach(model, ns.Selection({**good.tensors, **bad.tensors}, {}))
    assert all(p.requires_grad for p in model.parameters())
    assert len(list(model.parameters())) == len(list(llama().parameters()))


def test_twice() -> None:
    model = llama()
    ns.attach(model, select(model, {UP: ([0], [1])}))
    with pytest.raises(ns.UsageError, match="already has trainable neurons"):
        ns.attach(model, select(model, {"lm_head.weight": ([0], [1])}))


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Linear(3, 4))


class _Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.randn(4, 3))

    @property
    def weight(self) -> Any:
        return 2 * self._parameters["weight"]


class _Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)


LAYERS: dict[str, tuple[Any, str]] = {
    "offloaded": (lambda: nn.Linear(3, 4, device="meta"), "not in memory"),
    "renormalising": (lambda: nn.Embedding(4, 3, max_norm=1.0), "uses max_norm"),
    "a bag": (lambda: nn.EmbeddingBag(4, 3, max_norm=1.0), "uses max_norm"),
    "scripted": (_scripted, "torch.jit"),
    "hidden": (_Hidden, "behind a property"),
    "codes": (_Codes, "quantized.* _Codes"),
}


@pytest.mark.parametrize(("make", "says"), LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_layers_that_cannot_be_trained(make: Any, says: str) -> None:
    model = nn.Sequential(make())
    chosen = selection("0.weight", (4, 3), (0,), [1])
    with pytest.raises(ns.UsageError, match=says):
        ns.attach(model, chosen)


def test_another_tools_forward() -> None:
    """It reads the weight, whatever else it does."""
    model = nn.Sequential(nn.Linear(3, 4))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    with ns.attach(model, select(model, {"0.weight": ([0], [1])})) as attached:
        model(torch.ones(1, 3)).sum().backward()
        assert rows_of(attached, "0.weight").grad.tolist() == [[2, 2, 2]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself
def test_wrapped_models() -> None:
    model = llama()
    chosen = select(model, {UP: ([0], [1])})
    with pytest.raises(ns.UsageError, match="wrapped in OptimizedModule"):
        ns.attach(torch.compile(model), chosen)
    with pytest.raises(ns.UsageError, match="wrapped in DataParallel"):
        ns.attach(nn.DataParallel(model), chosen)


def test_an_unknown_mode() -> None:
    model = llama()
    with pytest.raises(ns.UsageError, match="no such mode"):
        ns.attach(model, select(model, {UP: ([0], [1])}), mode="additive")  # type: ignore[arg-type]
    with pytest.raises(ns.UsageError, match="no values"):
        ns.attach(model, select(model, {UP: ([0], [1])}), trainable=False)


class _Int8(nn.Linear):
    """Quantized in the manner of bitsandbytes: codes with a scale, and a forward pass of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_quantized_base(tmp_path: Path, axis: int) -> None:
    """The neurons start from the files' values, and train over a base that does not change."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    save_file(plain.state_dict(), tmp_path / "base")
    chosen = select(plain, {"0.weight": ([axis], [1, 3]), "0.bias": ([0], [0, 1])})
    model = nn.Sequential(_Int8(plain[0]), nn.ReLU(), plain[2])
    before = bits(model.state_dict())
    with pytest.raises(ns.UsageError, match="is quantized"):
        ns.attach(model, chosen)
    with pytest.raises(ns.UsageError, match="cannot be written into a quantized"):
        ns.attach(model, chosen, base=tmp_path / "base", mode="scatter")
    attached = ns.attach(model, chosen, base=tmp_path / "base")
    x = torch.randn(4, 5)
    mixed = (model[0].weight.float() * model[0].scale).movedim(axis, 0).clone()
    mixed[[1, 3]] = plain[0].weight.detach().movedim(axis, 0)[[1, 3]]
    weight = mixed.movedim(0, axis).requires_grad_()
    expected = plain[2](torch.relu(nn.functional.linear(x, weight, plain[0].bias)))
    torch.testing.assert_close(model(x), expected)
    (of_dense,) = torch.autograd.grad(expected.sum(), weight)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1)
    model(x).sum().backward()
    rows = rows_of(attached, "0.weight")
    torch.testing.assert_close(rows.grad, of_dense.movedim(axis, 0)[[1, 3]])
    assert rows_of(attached, "0.bias").grad.abs().max() > 0
    optimizer.step()
    with attached.patch() as patch:
        ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    patched = load_file(tmp_path / "patched")["0.weight"].movedim(axis, 0)
    assert torch.equal(patched[[1, 3]], rows.detach())
    attached.detach()
    assert bits(model.state_dict()) == before


def test_nothing_is_said_where_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(gpt2(), tmp_path / "base")
    with caplog.at_level(logging.INFO, "neftsurgery"):
        ns.attach(model, select(model, {"transformer.h.0.mlp.c_fc.weight": ([1], [1])})).detach()
    assert not [r for r in caplog.records if r.name.startswith("neftsurgery")]


def test_what_cannot_be_attached_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """And is not in the patch; a model of another shape is still refused."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Embedding(4, 3, max_norm=1.0))
    picks = {name: selection(name, (4, 3), (0,), [1]).tensors[name] for name in ("1.weight", "2.weight")}
    good = select(model, {"0.weight": ([0], [1, 3])}).tensors
    chosen = ns.Selection({**good, **picks}, {})
    with pytest.raises(ns.UsageError, match="max_norm"):
        ns.attach(model, ns.Selection({**good, "1.weight": picks["1.weight"]}, {}))
    attached = ns.attach(model, chosen, skip="unattachable")
    assert attached.skipped.keys() == picks.keys()
    assert "no such weight" in attached.skipped["2.weight"]
    assert "max_norm" in attached.skipped["1.weight"]
    (record,) = [record for record in caplog.records if record.name.startswith("neftsurgery")]
    assert "2.weight, 1.weight cannot be attached" in record.getMessage()
    assert attached.selection.neurons == 2
    assert "2 neurons in 1 module" in repr(attached)
    with attached.patch() as patch:
        assert list(patch.tensors) == ["0.weight"]
        attached.detach()
        with ns.attach(model, patch, skip="unattachable") as attached:
            assert not attached.skipped
    with pytest.raises(ns.UsageError, match="max_norm"):  # nothing is left
        ns.attach(model, ns.Selection({"1.weight": picks["1.weight"]}, {}), skip="unattachable")
    with pytest.raises(ns.MismatchError, match="another shape"):
        wrong = selection("0.weight", (4, 5), (0,), [1]).tensors
        ns.attach(model, ns.Selection({**wrong, **picks}, {}), skip="unattachable")
    with pytest.raises(ns.UsageError, match="no such way to skip"):
        ns.attach(model, chosen, skip="all")  # type: ignore[arg-type]
