"""The gradient probe against autograd's own gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tuning_support import batch, bert, bits, gpt2, llama, saved, vectors

import neftsurgery as ns
from neftsurgery.surgery.pairing import Scope, pair
from neftsurgery.training.gradients import gradient_scores

BATCHES = [batch(seed) for seed in range(3)]


def oracle(model: Any, name: str, axes: Any) -> torch.Tensor:
    """Squared norms of the neurons' gradients, one batch at a time, in float64."""
    count = np.prod([model.get_parameter(name).shape[axis] for axis in axes])
    total = torch.zeros(int(count), dtype=torch.float64)
    for one in BATCHES:
        (gradient,) = torch.autograd.grad(model(**one).loss, [model.get_parameter(name)])
        total += vectors(gradient.double(), axes, range(int(count))).square().sum(1)
    return total


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_scores_are_the_squared_gradients(tmp_path: Path, make: Any) -> None:
    model = saved(make(), tmp_path / "base")
    before = bits(model.state_dict())
    base = ns.open_checkpoint(tmp_path / "base")
    anatomy = pair(base, base, Scope()).anatomy
    with gradient_scores(model, base, anatomy, BATCHES, tmp_path / "scores") as scores:
        assert scores.score == "gradient"
        assert scores.tensors.keys() == {tensor.info.name for tensor in anatomy.scored}
        for tensor in anatomy.scored:
            expected = oracle(model, tensor.info.name, tensor.axes).numpy()
            np.testing.assert_allclose(scores.values(tensor.info.name), expected, rtol=1e-5, atol=1e-12)
        assert bits(model.state_dict()) == before
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        selection = scores.select(neurons=5, with_bias=True)
    again = ns.Scores.load(tmp_path / "scores")
    best = sorted(((v, name) for name in again.tensors for v in again.values(name)), reverse=True)[:5]
    assert sorted(name for _, name in best) == sorted(
        name for name, chosen in selection.tensors.items() if name in scores.tensors for _ in chosen.index
    )
    if make is not llama:
        assert any(name.endswith(".bias") for name in selection.tensors)
    with safe_open(tmp_path / "scores", "np") as file:
        assert all(file.get_tensor(name).dtype == np.float32 for name in scores.tensors)
    with pytest.raises(ns.UsageError, match="changed"):
        ns.Scores.load(tmp_path / "scores").select(changed=True)


def test_units_score_as_one(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.open_checkpoint(tmp_path / "base")
    anatomy = pair(base, base, Scope("units")).anatomy
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate", "down")]
    with gradient_scores(model, base, anatomy, BATCHES) as scores:
        expected = sum(oracle(model, name, [1 if "down" in name else 0]) for name in names)
        for name in names:
            np.testing.assert_allclose(scores.values(name), expected, rtol=1e-5)  # type: ignore[arg-type]
        chosen = scores.select(neurons=2).tensors
    assert {name: len(part.index) for name, part in chosen.items()}


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.open_checkpoint(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ns.MismatchError, match="no number"):
        gradient_scores(model, base, pair(base, base, Scope()).anatomy, BATCHES)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
