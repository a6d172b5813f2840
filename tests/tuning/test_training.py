"""Training the chosen neurons equals training the full model and restoring the rest after each step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuning_support import (
    FAMILIES,
    batch,
    bits,
    gpt2,
    llama,
    others,
    own_state,
    rows_of,
    saved,
    select,
    train,
    vectors,
)

import neftsurgery as ns

MODES = ("scatter", "overlay")


def train_and_restore(model: nn.Module, picks: Any, steps: int, **options: Any) -> nn.Module:
    """The oracle: AdamW with full gradients; after each step, everything that is not chosen is restored."""
    twin = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer = torch.optim.AdamW([twin.get_parameter(name) for name in picks], **options)
    for step in range(steps):
        optimizer.zero_grad()
        twin(**batch(step)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, (axes, index) in picks.items():
                weight = twin.get_parameter(name)
                mask = torch.zeros(weight.shape, dtype=torch.bool)
                mask.movedim(axes[0], 0)[list(index)] = True
                weight.copy_(torch.where(mask, weight, before[name]))
    return twin


ADAM = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_with_weight_decay(family: str, mode: Any) -> None:
    make, picks = FAMILIES[family]
    model = make()
    before = bits(model.state_dict())
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    oracle = train_and_restore(model, picks, 10, **ADAM)
    attached = ns.attach(model, select(model, picks), mode=mode)
    train(model, attached, 10, **ADAM)
    for name, (axes, index) in picks.items():
        expected = vectors(oracle.get_parameter(name).detach(), axes, index)
        assert not torch.equal(expected, vectors(tensors[name], axes, index))
        torch.testing.assert_close(rows_of(attached, name).detach(), expected, rtol=1e-6, atol=1e-6)
        weight = dict(model.named_parameters(remove_duplicate=False))[name].detach()
        assert torch.equal(others(weight, axes, index), others(tensors[name], axes, index))
        now = rows_of(attached, name).detach() if mode == "scatter" else vectors(tensors[name], axes, index)
        assert torch.equal(vectors(weight, axes, index), now)
    now = bits(own_state(model))
    assert list(now) == list(before)
    homes = {model.get_parameter(name).data_ptr() for name in picks}
    assert all(model.state_dict()[n].data_ptr() in homes for n in now if now[n] != before[n])
    attached.detach()
    assert bits(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_everything_else_that_training_does(mode: Any) -> None:
    """Clipping, accumulation and an optimizer over all parameters, decay included, leave other bits alone."""
    model = llama()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from something earlier
    before = {name: t.clone() for name, t in model.state_dict().items()}
    picks = FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks), mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            (model(**batch(2 * step + part)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    for name, now in own_state(model).items():
        axes, index = picks.get(name, ([0], []))
        assert torch.equal(others(now, axes, index), others(before[name], axes, index)), name
    assert not torch.equal(rows_of(attached, "lm_head.weight"), before["lm_head.weight"][[2, 49]])


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_is_one_large_batch(mode: Any) -> None:
    model, picks = llama(), FAMILIES["llama"][1]
    whole = batch(size=4)
    ns.attach(model, select(model, picks), mode=mode)
    model(**whole).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(**{key: value[half] for key, value in whole.items()}).loss / 2).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(mode: Any, reentrant: bool) -> None:
    model, picks = llama(), FAMILIES["llama"][1]
    attached = ns.attach(model, select(model, picks), mode=mode)
    model.train()
    model(**batch()).loss.backward()
    expected = [p.grad.clone() for p in attached.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # as for every frozen base: torch sees no gradient to compute otherwise
        model.enable_input_require_grads()
    model(**batch(), use_cache=False).loss.backward()
    for parameter, gradient in zip(attached.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast(family: str, mode: Any) -> None:
    """bfloat16 computation over float32 weights: as close to the dense gradient as dense bfloat16 is."""
    make, picks = FAMILIES[family]
    model = make()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = twin(**batch()).loss
    expected.backward()
    attached = ns.attach(model, select(model, picks), mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    loss.backward()
    for name, (axes, index) in picks.items():
        dense = vectors(twin.get_parameter(name).grad, axes, index)
        mine = rows_of(attached, name).grad
        assert mine.dtype == torch.float32
        assert (mine - dense).norm() <= 0.05 * dense.norm(), name


@pytest.mark.parametrize("mode", MODES)
def test_small_steps_are_not_lost_in_bfloat16(mode: Any) -> None:
    """The values are float32 whatever the base is; the weight holds them rounded to its own dtype."""
    model = llama().to(torch.bfloat16)
    picks = {"model.layers.0.mlp.up_proj.weight": ([0], [1, 5])}
    attached = ns.attach(model, select(model, picks), mode=mode)
    (rows,) = attached.parameters()
    start = rows.detach().clone()
    train(model, attached, 20, lr=1e-5, weight_decay=0)
    moved = (rows.detach() - start).abs()
    assert rows.dtype == torch.float32
    assert float(moved.max()) > 1.5e-4 / 20
    assert float((moved > 0).float().mean()) > 0.99
    if mode == "scatter":
        weight = model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight[[1, 5]], rows.detach().to(torch.bfloat16))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself
def test_compiled_without_graph_breaks(mode: Any, backend: str) -> None:
    """There is one graph, and it sees the values that the optimizer writes between its runs."""
    torch.compiler.reset()
    model, twin = gpt2(layers=1), gpt2(layers=1)  # each layer takes a compiler half a minute
    picks = {name.replace(".h.1.", ".h.0."): pick for name, pick in FAMILIES["gpt2"][1].items()}
    plain, attached = (ns.attach(m, select(m, picks), mode=mode) for m in (twin, model))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(a.parameters(), lr=0.5) for a in (plain, attached)]
    for step in range(3):
        losses = []
        for run, optimizer in zip((twin, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            loss = _loss(run, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for one in (plain, attached):
            for parameter in one.parameters():
                parameter.add_(0.1)
            one.refresh()
    torch.testing.assert_close(_loss(compiled, 9), _loss(twin, 9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch of itself
def test_a_model_that_is_compiled_already(mode: Any) -> None:
    """torch compiles it again after attach, and again after detach."""
    torch.compiler.reset()
    model, ids = gpt2(layers=1), batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(input_ids=ids).logits
    picks = {name.replace(".h.1.", ".h.0."): pick for name, pick in FAMILIES["gpt2"][1].items()}
    attached = ns.attach(model, select(model, picks), mode=mode)
    compiled(input_ids=ids).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in attached.parameters())
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(1)
    attached.refresh()
    assert not torch.allclose(compiled(input_ids=ids).logits, before)
    attached.detach()
    assert torch.equal(compiled(input_ids=ids).logits, before)


def _loss(model: Any, seed: int) -> Tensor:
    ids = batch(seed)["input_ids"]
    return nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_patch_then_apply_then_load(tmp_path: Path, family: str, mode: Any) -> None:
    """The patched files give the live model's logits: to the bit in scatter mode."""
    make, picks = FAMILIES[family]
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model = saved(make().to(dtype), folder)
        attached = ns.attach(model, select(model, picks), mode=mode)
        train(model, attached, 3, **ADAM)
        patch = attached.patch(tmp_path / f"{dtype}.patch", reversible=True)
        assert patch.base["fingerprint"] is not None
        ns.apply(folder, patch, out=folder.with_name("patched"), force=True)
        logits = model(**batch()).logits
        loaded = type(model).from_pretrained(folder.with_name("patched"), dtype="auto")(**batch()).logits
        if mode == "scatter":
            assert torch.equal(loaded, logits)
        assert (loaded - logits).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * logits.norm()
        ns.revert(folder.with_name("patched"), patch, out=folder.with_name("back"), force=True)
        assert ns.verify(folder.with_name("back"), patch).state == "base"
        patch.close()
