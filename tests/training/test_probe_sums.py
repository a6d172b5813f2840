"""The contrast of activations, against a direct computation; `test_gradient_probe` has the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_support import batch, gpt2, llama, saved

import neftsurgery as ns
from neftsurgery.options import Scope
from neftsurgery.surgery.pairing import pair
from neftsurgery.training.gradient_probe import gradient_scores

ONE, OTHER = [batch(seed) for seed in (1, 2)], [batch(seed) for seed in (3, 4, 5)]
for some in (*ONE, *OTHER):
    some["attention_mask"] = torch.ones_like(some["input_ids"])
    some["attention_mask"][0, -2:] = 0  # padding, which does not count


def taken(model: Any, module: str, batches: Any) -> torch.Tensor:
    """What a layer takes in, ``[tokens, in]``."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for one in batches:
            hook = model.get_submodule(module).register_forward_pre_hook(
                lambda _, args: found.append(args[0])
            )
            model(**one)
            hook.remove()
            found[-1] = found[-1][one["attention_mask"] == 1]
    return torch.cat(found).double()


def contrast(model: Any, name: str) -> np.ndarray[Any, Any]:
    """By hand: the difference of the means over the standard deviation, in float64."""
    module, weight = name.removesuffix(".weight"), model.get_parameter(name).detach().double()
    sides = [taken(model, module, batches) for batches in (ONE, OTHER)]
    if "down_proj" not in name:
        bias = getattr(model.get_submodule(module), "bias", None)
        weight = weight if type(model).__name__.startswith("GPT2") else weight.T
        sides = [side @ weight + (0 if bias is None else bias.detach().double()) for side in sides]
    means, variances = zip(*((side.mean(0), side.var(0, correction=0)) for side in sides), strict=True)
    return ((means[0] - means[1]).abs() / ((variances[0] + variances[1]) / 2).sqrt()).numpy()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_activations_of_rows(tmp_path: Path, make: Any) -> None:
    model = saved(make(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope("ffn" if make is llama else "rows")).anatomy
    with gradient_scores(model, base, anatomy, ONE, against=OTHER, score="activation") as scores:
        assert scores.score == "activation"
        for tensor in anatomy.scored:
            name = tensor.info.name
            np.testing.assert_allclose(scores.values(name), contrast(model, name), rtol=1e-3, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_unit_has_the_root_of_the_sum_of_squares(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope("units")).anatomy
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate", "down")]
    with gradient_scores(model, base, anatomy, ONE, against=OTHER, score="activation") as scores:
        expected = np.sqrt(sum(contrast(model, name) ** 2 for name in names))
        for name in names:
            np.testing.assert_allclose(scores.values(name), expected, rtol=1e-3)


def test_a_weight_that_is_no_linear_layer(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    anatomy = pair(base, base, Scope(include=("*embed_tokens*",))).anatomy
    with pytest.raises(ns.UsageError, match="activations are those of linear layers"):
        gradient_scores(model, base, anatomy, ONE, against=OTHER, score="activation")
    assert all(p.requires_grad for p in model.parameters())
