"""State dicts hold the trained values, and ``save_pretrained`` writes a model that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from trainer_support import arguments, examples
from transformers import Trainer
from tuning_support import FAMILIES, batch, bits, gpt2, llama, rows_of, saved, select, train

import neftsurgery as ns

MODES = ("scatter", "overlay")
ADAM = {"lr": 1e-2, "weight_decay": 0.1}
LLAMA = FAMILIES["llama"][1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the second has tied weights
def test_save_pretrained_writes_the_trained_model(tmp_path: Path, family: str, mode: Any) -> None:
    """With the entries of a plain one, also by a state that is handed over."""
    make, picks = FAMILIES[family]
    model = saved(make(), tmp_path / "base")
    before = bits(model.state_dict())
    attached = ns.attach(model, select(model, picks), mode=mode)
    train(model, attached, 2, **ADAM)
    logits = model(**batch()).logits
    assert len(model.state_dict()) == len(before) + len(picks)
    for name, state in {"whole": None, "handed over": model.state_dict()}.items():
        model.save_pretrained(tmp_path / name, state_dict=state)
        again, said = type(model).from_pretrained(tmp_path / name, dtype="auto", output_loading_info=True)
        assert (said["unexpected_keys"], said["missing_keys"]) == (set(), set())
        torch.testing.assert_close(again.eval()(**batch()).logits, logits, rtol=1e-5, atol=1e-5)
    with attached.disabled():
        assert bits(saved(model, tmp_path / "base again").state_dict()) == before
    attached.detach()
    assert "save_pretrained" not in vars(model)
    assert bits(saved(model, tmp_path / "after").state_dict()) == before


def test_a_plain_model_does_not_take_the_state_for_its_own() -> None:
    model = llama()
    ns.attach(model, select(model, LLAMA), mode="overlay")
    with pytest.raises(RuntimeError, match="weight_neurons_"):
        llama().load_state_dict(model.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_other_neurons_is_refused(strict: bool) -> None:
    """As many of the same weight."""
    first, second = llama(), llama()
    ns.attach(first, select(first, {"lm_head.weight": ([0], [1, 2])}))
    attached = ns.attach(second, select(second, {"lm_head.weight": ([0], [1, 3])}))
    rows = rows_of(attached, "lm_head.weight").detach().clone()
    with pytest.raises(ns.MismatchError, match=r"tensor lm_head\.weight: .*other neurons"):
        second.load_state_dict(first.state_dict(), strict=strict)
    assert torch.equal(rows_of(attached, "lm_head.weight"), rows)


@pytest.mark.parametrize("mode", MODES)
def test_resuming_from_a_checkpoint_of_accelerate(tmp_path: Path, mode: Any) -> None:
    """It goes on with the same bits, of a base in bfloat16 as well."""

    def made() -> Any:
        model = llama().to(torch.bfloat16)
        attached = ns.attach(model, select(model, LLAMA), mode=mode)
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW(attached.parameters(), **ADAM)
        return attached, accelerator, *accelerator.prepare(model, optimizer)

    def steps(model: Any, optimizer: Any, seeds: Any) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(**batch(seed)).loss.backward()
            optimizer.step()

    _, accelerator, model, optimizer = made()
    steps(model, optimizer, range(3))
    accelerator.save_state(str(tmp_path / "state"))
    steps(model, optimizer, (7, 8))
    resumed, accelerator, again, optimizer = made()
    accelerator.load_state(str(tmp_path / "state"))
    steps(again, optimizer, (7, 8))
    assert bits(model.state_dict()) == bits(again.state_dict())
    resumed.detach()
    assert bits(again.state_dict()) == bits(llama().to(torch.bfloat16).state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_trainer(tmp_path: Path, mode: Any) -> None:
    """Its saves are the trained model, and it resumes from them: not from the base without a word."""

    def made(steps: int) -> tuple[ns.Attached, Trainer]:
        model = llama()
        attached = ns.attach(model, select(model, LLAMA), mode=mode)
        return attached, Trainer(model, arguments(tmp_path, max_steps=steps), train_dataset=examples())

    attached, trainer = made(4)
    trainer.train()
    expected = [parameter.detach().clone() for parameter in attached.parameters()]
    plain = type(llama()).from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(plain(**batch()).logits, trainer.model(**batch()).logits)
    resumed, trainer = made(4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for mine, theirs in zip(resumed.parameters(), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_of_another_module(tmp_path: Path) -> None:
    """Attached to a module around it: its own ``save_pretrained`` writes the trained model too."""
    model = nn.ModuleDict({"inner": gpt2()})
    name = "inner.transformer.h.0.mlp.c_fc.weight"
    attached = ns.attach(model, select(model, {name: ([1], [3])}), mode="overlay")
    with torch.no_grad():
        rows_of(attached, name).add_(1)
    logits = model["inner"](**batch()).logits
    torch.testing.assert_close(saved(model["inner"], tmp_path / "saved")(**batch()).logits, logits)
