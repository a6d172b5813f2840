"""Other neurons during training: what stays, what is new, and what an optimizer holds of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tuning_support import Picks, batch, bits, llama, own_state, rows_of, select, train, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q, GATE = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"
FIRST: Picks = {UP: ([0], [1, 5, 7]), DOWN: ([1], [0, 4]), Q: ([0], [2])}
SECOND: Picks = {UP: ([0], [5, 6, 7, 9]), DOWN: ([1], [0, 4]), GATE: ([0], [3])}


def state_of(optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    held = optimizer.state[rows]
    return held["exp_avg"].clone(), held["exp_avg_sq"].clone(), held["step"].clone()


@pytest.mark.parametrize("mode", MODES)
def test_neurons_that_stay_keep_values_and_state(mode: Any) -> None:
    model, base = llama(), llama()
    attached = ns.attach(model, select(model, FIRST), mode=mode)
    optimizer = train(model, attached, 3, lr=1e-2)
    kept = {name: rows_of(attached, name).detach().clone() for name in (UP, DOWN)}
    states = {name: state_of(optimizer, rows_of(attached, name)) for name in (UP, DOWN)}
    attached.select(select(model, SECOND))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in attached.parameters()}
    rows = rows_of(attached, UP).detach()
    assert torch.equal(rows[[0, 2]], kept[UP][[1, 2]])
    assert torch.equal(rows[[1, 3]], base.get_parameter(UP)[[6, 9]])
    assert torch.equal(rows_of(attached, DOWN).detach(), kept[DOWN])
    for mine, earlier in zip(state_of(optimizer, rows_of(attached, UP)), states[UP], strict=True):
        if mine.dim():
            assert torch.equal(mine[[0, 2]], earlier[[1, 2]])
            assert not mine[[1, 3]].any()
        else:
            assert mine == earlier
    for mine, earlier in zip(state_of(optimizer, rows_of(attached, DOWN)), states[DOWN], strict=True):
        assert torch.equal(mine, earlier)
    assert rows_of(attached, GATE) not in optimizer.state
    for name in (UP, Q):  # those that left
        weight = model.get_parameter(name)
        assert torch.equal(vectors(weight, [0], [1, 2]), vectors(base.get_parameter(name), [0], [1, 2]))
    before = rows_of(attached, GATE).detach().clone()
    model(**batch(5)).loss.backward()
    optimizer.step()
    assert not torch.equal(rows_of(attached, GATE), before)
    attached.detach()
    assert bits(model.state_dict()) == bits(base.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_going_on_is_as_if_nothing_happened(mode: Any) -> None:
    """Training the same neurons again, by way of others, gives the bits of training them throughout."""
    ends = []
    for by_way in (False, True):
        model = llama()
        attached = ns.attach(model, select(model, FIRST), mode=mode)
        optimizer = train(model, attached, 2, lr=1e-2)
        if by_way:
            attached.select(select(model, FIRST | {GATE: ([0], [3])}))
            attached.select(select(model, FIRST))
        model.zero_grad()
        model(**batch(7)).loss.backward()
        optimizer.step()
        ends.append(bits(own_state(model)))
        with attached.patch() as patch:
            assert patch.selection.neurons == 6
    assert ends[0] == ends[1]


def test_parameters_of_the_user_stay_trainable() -> None:
    model = llama()
    attached = ns.attach(model, select(model, FIRST))
    model.model.norm.weight.requires_grad_(True)
    attached.select(select(model, SECOND))
    assert model.model.norm.weight.requires_grad
    assert not dict(model.named_parameters())[UP].requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_selection_that_does_not_fit_changes_nothing(mode: Any) -> None:
    model = llama()
    attached = ns.attach(model, select(model, FIRST), mode=mode)
    optimizer = train(model, attached, 2, lr=1e-2)
    before, groups = bits(model.state_dict()), list(optimizer.param_groups[0]["params"])
    wider = llama(intermediate_size=32)
    with pytest.raises(ns.MismatchError, match="another shape"):
        attached.select(select(wider, {UP: ([0], [1, 30])}))
    assert bits(model.state_dict()) == before
    assert all(a is b for a, b in zip(groups, attached.parameters(), strict=True))
    optimizer.zero_grad()
    model(**batch(5)).loss.backward()
    optimizer.step()
    assert bits(model.state_dict()) != before


def test_what_cannot_be_carried_over_is_refused() -> None:
    """A state by rows and columns; a buffer of an optimizer's own; an optimizer that was not seen."""
    model = llama()
    attached = ns.attach(model, select(model, FIRST))
    optimizer = torch.optim.Adafactor(attached.parameters())
    model(**batch()).loss.backward()
    optimizer.step()
    before = bits(model.state_dict())
    with pytest.raises(ns.UsageError, match="cannot be divided"):
        attached.select(select(model, SECOND))
    assert bits(model.state_dict()) == before
    del optimizer
    unseen = torch.optim.AdamW(attached.parameters())
    attached.select(select(model, SECOND))
    with pytest.raises(ns.UsageError, match="trains neurons that were detached"):
        unseen.step()
    for parameter in attached.parameters():
        parameter.data = torch.zeros(2, parameter.numel())[1].view_as(parameter)
    with pytest.raises(ns.UsageError, match="cannot be divided"):
        attached.select(select(model, FIRST))


def test_neurons_of_a_patch_are_not_selected() -> None:
    model = llama()
    attached = ns.attach(model, select(model, FIRST))
    patch = attached.patch()
    attached.detach()
    with ns.attach(model, patch, base=False) as patched, pytest.raises(ns.UsageError, match="not trained"):
        patched.select(select(model, SECOND))
