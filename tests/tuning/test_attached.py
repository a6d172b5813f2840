"""Attached neurons: their patch, their state, switching, and what `detach` ends."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_support import OTHER, PICKS, ModelOnDisk
from torch import Tensor, nn
from tuning_support import FAMILIES, batch, bits, llama, own_state, rows_of, saved, select, train, vectors

import neftsurgery as ns

UP = "model.layers.0.mlp.up_proj.weight"
MODES = ("scatter", "overlay")
ADAM = {"lr": 1e-2, "weight_decay": 0.1}


def test_a_base_that_changes_meanwhile(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    llama(initializer_range=0.1).save_pretrained(tmp_path / "base")
    with pytest.raises(ns.MachineError, match="changed by someone else"):
        attached.patch(tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    attached.patch(tmp_path / "patch").close()
    with pytest.raises(ns.UsageError, match="exists"):
        attached.patch(tmp_path / "patch")
    attached.patch(tmp_path / "patch", force=True).close()


def test_after_detach() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {UP: ([0], [1])}))
    optimizer = torch.optim.AdamW(attached.parameters())
    attached.detach()
    before = bits(model.state_dict())
    calls: list[Callable[[], Any]] = [
        attached.detach,
        attached.patch,
        attached.refresh,
        attached.state_dict,
        lambda: list(attached.parameters()),
    ]
    for call in calls:
        with pytest.raises(ns.UsageError, match="detached"):
            call()
    with pytest.raises(ns.UsageError, match="the optimizer trains neurons that were detached"):
        optimizer.step()
    assert bits(model.state_dict()) == before
    again = ns.attach(model, select(model, {UP: ([0], [1])}))
    torch.optim.AdamW(again.parameters()).step()
    with pytest.raises(ns.UsageError, match="detached"):
        optimizer.step()


def test_a_state_of_another_selection() -> None:
    first, second = llama(), llama()
    state = ns.attach(first, select(first, {UP: ([0], [1, 2])})).state_dict()
    attached = ns.attach(second, select(second, {UP: ([0], [1, 3])}))
    with pytest.raises(ns.MismatchError, match="other neurons"):
        attached.load_state_dict(state)
    with pytest.raises(ns.MismatchError, match="another selection"):
        attached.load_state_dict({})


@pytest.mark.parametrize("mode", MODES)
def test_switching(on_disk: ModelOnDisk, mode: Any) -> None:
    """Between patches with common neurons, back, and off."""
    one, two = on_disk.patch("one", PICKS, 1), on_disk.patch("two", OTHER, 2)
    expected = {}
    for patch in (one, two):
        with ns.attach(on_disk.model, patch, mode=mode):
            expected[patch] = on_disk.live_logits()
        if mode == "scatter":
            assert torch.equal(expected[patch], on_disk.patched_logits(patch))
    attached = ns.attach(on_disk.model, one, mode=mode)
    for patch in (two, one, one, two):
        attached.switch(patch)
        assert torch.equal(on_disk.live_logits(), expected[patch])
        assert attached.selection.neurons == patch.neurons
    attached.detach()
    assert bits(on_disk.model.state_dict()) == on_disk.before


@pytest.mark.parametrize("mode", MODES)
def test_a_switch_that_fails_leaves_the_earlier_patch(tmp_path: Path, mode: Any) -> None:
    on_disk = ModelOnDisk(tmp_path)
    one = on_disk.patch("one", PICKS)
    foreign = ModelOnDisk(tmp_path / "foreign")
    with torch.no_grad():
        foreign.model.lm_head.weight.add_(1)
    foreign.model.save_pretrained(foreign.folder)
    attached = ns.attach(on_disk.model, one, mode=mode)
    expected = on_disk.live_logits()
    with pytest.raises(ns.MismatchError, match="another base"):
        attached.switch(foreign.patch("two", {"lm_head.weight": ([0], [1])}))
    assert torch.equal(on_disk.live_logits(), expected)
    attached.detach()
    assert bits(on_disk.model.state_dict()) == on_disk.before


@pytest.mark.parametrize("mode", MODES)
def test_resuming_is_going_on(mode: Any) -> None:
    """Values and optimizer state, loaded into new objects, give the same bits after more steps."""
    picks = FAMILIES["llama"][1]
    model = llama()
    attached = ns.attach(model, select(model, picks), mode=mode)
    optimizer = train(model, attached, 3, **ADAM)
    state = pickle.loads(pickle.dumps((attached.state_dict(), optimizer.state_dict())))
    again = llama()
    resumed = ns.attach(again, select(again, picks), mode=mode)
    resumed.load_state_dict(state[0])
    continued = torch.optim.AdamW(resumed.parameters(), **ADAM)
    continued.load_state_dict(state[1])
    for one, step in ((model, optimizer), (again, continued)):
        for seed in (7, 8):
            step.zero_grad()
            one(**batch(seed)).loss.backward()
            step.step()
    for mine, theirs in zip(attached.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert bits(model.state_dict()) == bits(again.state_dict())


def test_a_patch_of_a_wider_live_type(tmp_path: Path) -> None:
    """bfloat16 files loaded as float32: the patch has the files' dtype and fits them."""
    saved(llama().to(torch.bfloat16), tmp_path / "base")
    model = type(llama()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    picks = FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks, "BF16"))
    train(model, attached, 2, **ADAM)
    with attached.patch() as patch:
        assert {tensor.info.dtype for tensor in patch.tensors.values()} == {"BF16"}
        ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    loaded = type(model).from_pretrained(tmp_path / "patched", dtype=torch.float32)
    for name, (axes, index) in picks.items():
        expected = rows_of(attached, name).detach().to(torch.bfloat16).float()
        assert torch.equal(vectors(loaded.get_parameter(name), axes, index), expected)


def test_a_patch_of_a_model_without_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before: dict[str, Tensor] = {n: t.clone() for n, t in model.state_dict().items()}
    from safetensors.torch import load_file, save_file

    save_file(before, tmp_path / "base.safetensors")
    attached = ns.attach(model, select(model, {"0.weight": ([1], [0, 2]), "0.bias": ([0], [3])}))
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.mul_(2)
    attached.refresh()
    with attached.patch() as patch:
        assert patch.base["fingerprint"] is None
        ns.apply(tmp_path / "base.safetensors", patch, out=tmp_path / "out.safetensors")
    now = dict(sorted(own_state(model).items()))
    assert bits(dict(sorted(load_file(tmp_path / "out.safetensors").items()))) == bits(now)


@pytest.mark.parametrize("mode", MODES)
def test_what_it_prints(tmp_path: Path, mode: Any) -> None:
    model = saved(llama(), tmp_path / "base")
    picks = {UP: ([0], [1, 5]), "lm_head.weight": ([0], [2])}
    attached = ns.attach(model, select(model, picks), mode=mode)
    assert repr(attached) == (
        "Attached(LlamaForCausalLM, 3 neurons in 2 modules, 48 trainable parameters, "
        f"mode={mode}, base={tmp_path / 'base'})"
    )
    patch = attached.patch()
    attached.detach()
    assert repr(attached) == "Attached(LlamaForCausalLM, detached)"
    attached = ns.attach(model, patch, base=False)
    assert repr(attached) == (
        "Attached(LlamaForCausalLM, 3 neurons in 2 modules, 48 patched parameters, "
        "mode=scatter, base=live weights)"
    )
    attached.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second has a tied weight and biases
def test_disabled(family: str, mode: Any) -> None:
    """The base to the bit, then the values again; of trained neurons, and of a patch."""
    make, picks = FAMILIES[family]
    model, ids = make(), batch()["input_ids"]
    base = model(input_ids=ids).logits
    attached = ns.attach(model, select(model, picks), mode=mode)
    train(model, attached, 2, **ADAM)
    for now in (attached, None):
        if now is None:
            patch = attached.patch()
            attached.detach()
            now = ns.attach(model, patch, mode=mode, base=False)
        trained, state = model(input_ids=ids).logits, bits(model.state_dict())
        assert not torch.equal(trained, base)
        with now.disabled(), torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base)
            with now.disabled():
                assert torch.equal(model(input_ids=ids).logits, base)
            assert torch.equal(model(input_ids=ids).logits, base)
        assert torch.equal(model(input_ids=ids).logits, trained)
        assert bits(model.state_dict()) == state
        with pytest.raises(KeyError), now.disabled():
            raise KeyError
        assert torch.equal(model(input_ids=ids).logits, trained)


@pytest.mark.parametrize("mode", MODES)
def test_disabled_in_the_midst_of_training(mode: Any) -> None:
    """A penalty on the distance from the base, as in preference training, has the gradient of plain torch."""
    model, base = llama(), llama()
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]), mode=mode)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.05)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    (model(input_ids=ids).logits - expected).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in attached.parameters()]
    for first in (True, False):  # whichever is computed first
        model.zero_grad()
        mine = model(input_ids=ids).logits if first else None
        with attached.disabled(), torch.no_grad():
            reference = model(input_ids=ids).logits
        mine = model(input_ids=ids).logits if mine is None else mine
        (mine - reference).square().sum().backward()
        for parameter, gradient in zip(attached.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_a_backward_pass_while_disabled_is_refused() -> None:
    """The weight does not hold what the graph was computed with."""
    model = llama()
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]))
    loss = model(**batch()).loss
    with attached.disabled(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
