"""Modules with neurons keep their state dicts, and an installation that fails leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
from tuning_support import FAMILIES, bits, gpt2, llama, select

import neftsurgery as ns
from neftsurgery.tuning.attached_neurons import AttachedNeurons
from neftsurgery.tuning.install import has_foreign_forward

MODES = ("scatter", "overlay")


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
