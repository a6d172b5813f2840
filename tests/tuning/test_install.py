"""Modules with neurons keep their state dicts, and an installation that fails leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_support import FAMILIES, batch, bits, gpt2, llama, saved, select, train

import neftsurgery as ns
from neftsurgery.tuning.attached_neurons import AttachedNeurons
from neftsurgery.tuning.install import has_foreign_forward

MODES = ("scatter", "overlay")
ADAM = {"lr": 1e-2, "weight_decay": 0.1}


def test_loading_a_base_does_not_take_the_values_out() -> None:
    model = llama()
    base = {name: t.clone() for name, t in model.state_dict().items()}
    attached = ns.attach(model, select(model, {"lm_head.weight": ([0], [4])}))
    train(model, attached, 1, **ADAM)
    logits = model(**batch()).logits
    assert not model.load_state_dict(base).missing_keys
    assert torch.equal(model(**batch()).logits, logits)


def test_the_model_can_be_saved_while_its_neurons_train(tmp_path: Path) -> None:
    """As a full model: its own tensors and no others; a scatter's are those of the trained model."""
    model = saved(llama(), tmp_path / "base")
    attached = ns.attach(model, select(model, FAMILIES["llama"][1]))
    train(model, attached, 2, **ADAM)
    logits = model(**batch()).logits
    again = saved(model, tmp_path / "whole")
    assert torch.equal(again(**batch()).logits, logits)
    model.load_state_dict(again.state_dict(), strict=True)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_installation_is_undone(
    monkeypatch: pytest.MonkeyPatch, mode: Any, failing: int
) -> None:
    """Whichever layer it stops at: the model's bits, attributes and parameters are as before."""
    model = gpt2()
    before = bits(model.state_dict()), [set(vars(module)) for module in model.modules()]
    make, made = AttachedNeurons.make_inverse_index, []

    def run_out_of_memory(neurons: AttachedNeurons) -> None:
        made.append(neurons)
        if len(made) > failing:
            raise MemoryError
        make(neurons)

    picks = FAMILIES["gpt2"][1] | {"transformer.wpe.weight": ([0], [1])}
    monkeypatch.setattr(AttachedNeurons, "make_inverse_index", run_out_of_memory)
    if failing < 2:
        with pytest.raises(MemoryError):
            ns.attach(model, select(model, picks), mode=mode)
    else:  # two embeddings: both are installed
        ns.attach(model, select(model, picks), mode=mode).detach()
    assert (bits(model.state_dict()), [set(vars(module)) for module in model.modules()]) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._state_dict_hooks for module in model.modules())


def test_a_forward_of_ours_is_not_foreign() -> None:
    model = llama()
    assert not has_foreign_forward(model.lm_head)
    with ns.attach(model, select(model, {"lm_head.weight": ([0], [4])})):
        assert "forward" in vars(model.lm_head)
        assert not has_foreign_forward(model.lm_head)
    model.lm_head.forward = lambda x: x
    assert has_foreign_forward(model.lm_head)
