"""``print(model)`` shows what is attached, and exactly what it showed before once that is detached."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn
from tuning_support import FAMILIES, gpt2, llama, select

import neftsurgery as ns

MODES = ("scatter", "overlay")


def line_of(model: nn.Module, name: str) -> str:
    """The one line of ``print(model)`` that begins with ``(name):``, or with ``name.``."""
    (line,) = {line.strip() for line in repr(model).split("\n") if line.strip().startswith(name)}
    return line


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_shown_and_then_none(family: str, mode: Any) -> None:
    make, picks = FAMILIES[family]
    model = make()
    before = repr(model), [set(vars(module)) for module in model.modules()]
    attached = ns.attach(model, select(model, picks), mode=mode)
    tied = 1 if "transformer.wte.weight" in picks else 0  # shown by both modules that use it
    assert repr(model).count(f"(trainable, {mode})") == len(picks) + tied
    attached.detach()
    assert (repr(model), [set(vars(module)) for module in model.modules()]) == before


def test_what_a_module_shows() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False))
    picks = {"0.weight": ([1], [0, 4]), "0.bias": ([0], [3])}
    attached = ns.attach(model, select(model, picks))
    assert line_of(model, "(0)") == (
        "(0): Linear(in_features=5, out_features=7, bias=True, "
        "bias_neurons=1 of 7 (trainable, scatter), weight_neurons=2 of 5 (trainable, scatter))"
    )
    assert line_of(model, "(1)") == "(1): Linear(in_features=7, out_features=2, bias=False)"
    patch = attached.patch()
    attached.detach()
    with ns.attach(model, patch, mode="overlay"):
        assert "weight_neurons=2 of 5 (patched, overlay)" in line_of(model, "(0)")
    with ns.attach(model, patch):
        assert "weight_neurons=2 of 5 (patched, scatter)" in line_of(model, "(0)")


def test_a_class_that_prints_itself_is_shown_on_its_parent() -> None:
    model = gpt2()
    ns.attach(model, select(model, {"transformer.h.1.mlp.c_fc.weight": ([1], [3, 63])}))
    assert "(c_fc): Conv1D(nf=64, nx=16)" in repr(model)
    assert line_of(model, "c_fc") == "c_fc.weight_neurons=2 of 64 (trainable, scatter)"


def test_two_patches_come_off_one_by_one() -> None:
    model = llama()
    before = repr(model)
    patches = []
    for index in ([1], [2, 3]):
        with ns.attach(model, select(model, {"lm_head.weight": ([0], index)})) as attached:
            patches.append(attached.patch())
    first, second = (ns.attach(model, patch) for patch in patches)
    assert "weight_neurons=1 of 50 (patched, scatter), weight_neurons=2 of 50" in line_of(model, "(lm_head)")
    first.detach()
    assert "bias=False, weight_neurons=2 of 50" in line_of(model, "(lm_head)")
    second.detach()
    assert repr(model) == before


def test_a_copy_shows_its_own_neurons() -> None:
    model = llama()
    attached = ns.attach(model, select(model, {"lm_head.weight": ([0], [1])}))
    twin = copy.deepcopy(model)
    shown = repr(model)
    attached.detach()
    assert repr(twin) == shown != repr(model)


def test_an_extra_repr_of_someone_else_stays() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    model[0].extra_repr = lambda: "mine"  # type: ignore[method-assign]
    before = vars(model[0])["extra_repr"]
    with ns.attach(model, select(model, {"0.weight": ([0], [1])})):
        assert repr(model[0]) == "Linear(mine)"
    assert vars(model[0])["extra_repr"] is before
