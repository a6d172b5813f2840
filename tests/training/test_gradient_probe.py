"""The gradient probes, and the scores files they write, against autograd's own gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tuning_support import batch, bert, bits, gpt2, llama, saved, vectors

import neftsurgery as ns
from neftsurgery.options import Scope
from neftsurgery.surgery.pairing import pair
from neftsurgery.training.gradient_probe import gradient_scores

BATCHES = [batch(seed) for seed in range(3)]


def both(model: Any, name: str, axes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The neurons' vectors and the mean signs of their gradients, by autograd, ``[n, width]`` in float64."""
    weight = model.get_parameter(name)
    every = range(int(np.prod([weight.shape[axis] for axis in axes])))
    signs = [torch.autograd.grad(model(**one).loss, [weight])[0].sign() for one in BATCHES]
    mean = torch.stack(signs).double().mean(0)
    return vectors(weight.detach().double(), axes, every), vectors(mean, axes, every)


def turned(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Half the squared sine of a small step's angle, over the step's square."""
    r = s - (s * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    return r.square().sum(1) / w.square().sum(1) / 2


def agreement(model: Any, name: str, axes: Any) -> torch.Tensor:
    return turned(*both(model, name, axes))


def squares(model: Any, name: str, axes: Any) -> torch.Tensor:
    """Squared norms of the neurons' gradients, one batch at a time, in float64."""
    weight = model.get_parameter(name)
    every = range(int(np.prod([weight.shape[axis] for axis in axes])))
    gradients = [torch.autograd.grad(model(**one).loss, [weight])[0].double() for one in BATCHES]
    return torch.stack([vectors(one, axes, every).square().sum(1) for one in gradients]).sum(0)


def ratios(model: Any, name: str, axes: Any) -> torch.Tensor:
    return (squares(model, name, axes) / both(model, name, axes)[0].square().sum(1)).sqrt()


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize(
    ("score", "oracle"),
    [("gradient", agreement), ("fisher", squares), ("gradient_over_weight", ratios)],
)
def test_scores_are_those_of_autograd(tmp_path: Path, make: Any, score: str, oracle: Any) -> None:
    model = saved(make(), tmp_path / "base")
    before = bits(model.state_dict())
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope()).anatomy
    with gradient_scores(model, base, anatomy, BATCHES, tmp_path / "scores", score=score) as scores:
        assert scores.score == score
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
        assert file.get_tensor("score").dtype == np.float32
        assert set(file.keys()) == {"score"}  # nothing has changed yet
    with pytest.raises(ns.UsageError, match="changed"):
        ns.Scores.load(tmp_path / "scores").select(changed=True)


@pytest.mark.parametrize("oracle", [agreement, squares])
def test_experts_that_the_loader_merges(tmp_path: Path, oracle: Any) -> None:
    """A row of an expert's tensor in the files is a row of one slice of the live weight."""
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = saved(transformers.MixtralForCausalLM(config), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope()).anatomy
    experts = "model.layers.0.mlp.experts"
    up = oracle(model, f"{experts}.gate_up_proj", (0, 1)).view(3, 2, 24)
    down = oracle(model, f"{experts}.down_proj", (0, 1)).view(3, 16)
    score = "fisher" if oracle is squares else "gradient"
    with gradient_scores(model, base, anatomy, BATCHES, score=score) as scores:
        for expert in range(3):
            for name, expected in {"w1": up[expert, 0], "w3": up[expert, 1], "w2": down[expert]}.items():
                found = scores.values(f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight")
                np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-12)


def test_units_score_as_one(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope("units")).anatomy
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate", "down")]
    with gradient_scores(model, base, anatomy, BATCHES) as scores:
        found = [both(model, name, [1 if "down" in name else 0]) for name in names]
        expected = turned(*(torch.cat(side, 1) for side in zip(*found, strict=True))).numpy()
        for name in names:
            np.testing.assert_allclose(scores.values(name), expected, rtol=1e-5)
        with gradient_scores(model, base, anatomy, BATCHES, score="fisher") as others:
            expected = sum(squares(model, name, [1 if "down" in name else 0]) for name in names).numpy()
            for name in names:
                np.testing.assert_allclose(others.values(name), expected, rtol=1e-5)
        chosen = scores.select(neurons=2).tensors
    assert {name: len(part.index) for name, part in chosen.items()}


def test_it_is_the_cosine_distance_of_a_small_step(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    name, step = "model.layers.1.self_attn.v_proj.weight", 1e-4
    w, s = both(model, name, [0])
    distance = 1 - torch.nn.functional.cosine_similarity(w, w - step * s)
    with gradient_scores(model, base, pair(base, base, Scope()).anatomy, BATCHES) as scores:
        np.testing.assert_allclose(scores.values(name), distance / step**2, rtol=0.02)


def test_many_batches_and_vectors_of_zeros(tmp_path: Path) -> None:
    """More batches than a byte can count; and a neuron of zeros that moves is turned more than any other."""
    model = llama()
    name = "model.layers.0.self_attn.v_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3] = 0
    base = ns.Checkpoint.open(saved(model, tmp_path / "base").name_or_path)
    anatomy = pair(base, base, Scope()).anatomy
    with (
        gradient_scores(model, base, anatomy, BATCHES[:1]) as once,
        gradient_scores(model, base, anatomy, BATCHES[:1] * 130) as often,
    ):
        for tensor in once.tensors:
            np.testing.assert_allclose(once.values(tensor), often.values(tensor), rtol=1e-6)
        assert once.values(name)[3] == np.finfo(np.float32).max
        assert np.isfinite(once.values(name)).all()


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ns.MismatchError, match="the loss of the base model is not a number"):
        gradient_scores(model, base, pair(base, base, Scope()).anatomy, BATCHES)
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
