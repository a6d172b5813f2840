"""The values of one weight's neurons: when they are written, copied and refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from tuning_support import FAMILIES, batch, llama, select

import neftsurgery as ns

MODES = ("scatter", "overlay")


def test_a_weight_that_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    ns.attach(model, select(model, {"0.weight": ([0], [1])}))
    model[0].weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ns.UsageError, match="replaced"):
        model(torch.zeros(1, 3))


CHANGES: dict[str, Callable[[ns.Attached, nn.Parameter], Any]] = {
    "in place": lambda attached, rows: rows.add_(1),
    "copied": lambda attached, rows: rows.copy_(rows + 1),
    "by an optimizer": lambda attached, rows: _step(rows),
    "by an optimizer that writes to data": lambda attached, rows: _DataStep([rows], {}).step(),
    "loaded": lambda attached, rows: attached.load_state_dict(
        {n: t + 1 if not n.endswith("index") else t for n, t in attached.state_dict().items()}
    ),
    "behind torch's back": lambda attached, rows: (rows.data.add_(1), attached.refresh()),
}


class _DataStep(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1)


def _step(rows: nn.Parameter) -> None:
    rows.grad = torch.full_like(rows, -1)
    torch.optim.SGD([rows], lr=1).step()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_change_the_values_is_noticed(mode: Any, change: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    attached = ns.attach(model, select(model, {"0.weight": ([0], [1, 3])}), mode=mode)
    expected = model[0].weight.detach().clone()
    expected[[1, 3]] += 1
    (rows,) = attached.parameters()
    with torch.no_grad():
        change(attached, rows)
    torch.testing.assert_close(model(torch.eye(3)).detach(), expected.t(), rtol=0, atol=0)


def test_the_weight_is_written_when_it_is_stale_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    attached = ns.attach(model, select(model, {"0.weight": ([0], [1])}))
    versions = [model[0].weight._version]
    for _ in range(3):
        model(x).sum().backward()
        versions.append(model[0].weight._version)
    assert len(set(versions)) == 1
    _step(next(attached.parameters()))
    model(x)
    model(x)
    assert model[0].weight._version == versions[0] + 1


@pytest.mark.parametrize("mode", MODES)
def test_a_deep_copy_is_a_model_of_its_own(mode: Any) -> None:
    model = llama()
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]), mode=mode)
    twin = copy.deepcopy(model)
    logits = model(**batch()).logits
    assert torch.equal(twin(**batch()).logits, logits)
    rows = [p for n, p in twin.named_parameters() if "_neurons_" in n]
    assert len(rows) == len(list(attached.parameters()))
    twin(**batch()).loss.backward()
    assert all(p.grad is None for p in attached.parameters())
    with torch.no_grad():
        for parameter in rows:
            assert parameter.grad is not None
            parameter.add_(1)
    assert not torch.equal(twin(**batch()).logits, logits)
    assert torch.equal(model(**batch()).logits, logits)


def test_a_model_with_neurons_cannot_be_pickled() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {"lm_head.weight": ([0], [4])}))
    with pytest.raises(ns.UsageError, match="cannot be pickled"):
        pickle.dumps(model)
    attached.detach()
    pickle.dumps(model)
