"""Layouts of diffusers, timm, sentence-transformers and others, against their own savers and loaders.

``make test-field`` runs them, in an environment of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from field_models import MODELS, FieldModel
from parts_support import contents
from torch import Tensor, nn

import neftsurgery as ns
from neftsurgery.neurons.submodels import split_part


class Saved:
    """A model, the folders of a base and a tuned checkpoint of it, and the tuned model."""

    def __init__(self, model: FieldModel, root: Path) -> None:
        self.model, self.root = model, root
        torch.manual_seed(0)
        made = model.make()
        model.save(made, root / "base")
        self.tuned = copy.deepcopy(made)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in self.parameters(self.tuned):
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.save(self.tuned, root / "tuned")
        self.axes = self._axes(made)

    def load(self, folder: Path) -> Any:
        model = self.model.load(folder)
        for module in self.model.parts(model).values():
            module.eval()
        return model

    def parameters(self, model: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in self.model.parts(model).items():
            for name, parameter in module.named_parameters():
                yield part + name, parameter

    def state(self, model: Any) -> dict[str, Tensor]:
        parts = self.model.parts(model).items()
        return {part + name: value for part, module in parts for name, value in module.state_dict().items()}

    def _axes(self, model: Any) -> dict[str, int]:
        """The axis of the output units of each weight of a known class of layers."""
        found = {}
        for part, module in self.model.parts(model).items():
            for path, layer in module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                    found[f"{part}{path}.weight"] = 0
                elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
                    found[f"{part}{path}.weight"] = 1
        return found


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def given_axes(saved: Saved, inspected: Any) -> dict[str, int]:
    """What ``axis`` says of the layers whose axes the files do not tell."""
    unknown = {one["name"] for one in inspected["tensors"] if "unknown layer" in one.get("reason", "")}
    return {name: axis for name, axis in saved.axes.items() if name in unknown}


def test_no_weight_has_neurons_along_another_axis(saved: Saved) -> None:
    inspected = ns.inspect(saved.root / "base")
    found = {one["name"]: one["neuron_axes"] for one in inspected["tensors"] if "neuron_axes" in one}
    wrong = {name: axes for name, axes in found.items() if axes != [saved.axes.get(name, 0)]}
    assert not wrong
    linear = {name for name, axis in saved.axes.items() if axis == 0}
    assert found.keys() & linear or not linear
    with_axes = ns.inspect(saved.root / "base", axis=given_axes(saved, inspected))
    left = {one["name"] for one in with_axes["tensors"] if "unknown layer" in one.get("reason", "")}
    assert not left & saved.axes.keys()


def test_scores_are_those_of_the_live_weights(saved: Saved) -> None:
    base, tuned = saved.root / "base", saved.root / "tuned"
    scores = ns.diff(base, tuned, score="l2", axis=given_axes(saved, ns.inspect(base)))
    before, after = saved.state(saved.load(base)), saved.state(saved.tuned)
    compared = 0
    for name in scores.tensors.keys() & before.keys() & saved.axes.keys():
        change = (after[name].double() - before[name].double()).movedim(saved.axes[name], 0).flatten(1)
        torch.testing.assert_close(
            torch.from_numpy(scores.values(name)).double(), change.norm(dim=1), rtol=1e-5, atol=0
        )
        compared += 1
    assert compared


def test_apply_makes_what_the_library_loads_as_the_tuned_model_and_revert_restores_the_bytes(
    saved: Saved,
) -> None:
    base, tuned, root = saved.root / "base", saved.root / "tuned", saved.root
    axis = given_axes(saved, ns.inspect(base))
    patch = ns.extract(base, tuned, changed=True, with_bias=True, reversible=True, axis=axis)
    ns.apply(base, patch, out=root / "patched")
    found, expected = saved.state(saved.load(root / "patched")), saved.state(saved.tuned)
    assert found.keys() == expected.keys()
    for name in patch.tensors.keys() & expected.keys():
        assert torch.equal(found[name], expected[name]), name
    assert ns.verify(root / "patched", patch).state == "patched"
    ns.revert(root / "patched", patch, in_place=True)
    assert contents(root / "patched") == contents(base)


def test_a_lossless_patch_is_the_tuned_folder(saved: Saved) -> None:
    base, tuned, root = saved.root / "base", saved.root / "tuned", saved.root
    patch = ns.extract(base, tuned, lossless=True, reversible=True)
    ns.apply(base, patch, out=root / "lossless")
    after = contents(root / "lossless")
    assert after == {name: content for name, content in contents(tuned).items() if name in after}
    assert contents(tuned).keys() - after.keys() <= {*patch.not_carried}
    found, expected = saved.state(saved.load(root / "lossless")), saved.state(saved.tuned)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ns.revert(root / "lossless", patch, in_place=True)
    assert contents(root / "lossless") == {n: c for n, c in contents(base).items() if n in after}


def test_attached_neurons_train_and_their_patch_makes_the_same_outputs(saved: Saved) -> None:
    base, root = saved.root / "base", saved.root
    scores = ns.diff(base, saved.root / "tuned", axis=given_axes(saved, ns.inspect(base)))
    selection = scores.select(neurons="20%", per="tensor")
    assert selection.tensors.keys() >= saved.axes.keys() & scores.tensors.keys()
    live = saved.load(base)
    for number, (part, module) in enumerate(saved.model.parts(live).items()):
        chosen = {n: one for n, one in selection.tensors.items() if split_part(n)[0] == part}
        attached = ns.attach(module, ns.Selection(chosen, selection.facts), base=base)
        optimizer = torch.optim.SGD(attached.parameters(), 0.1)
        before = saved.model.run(live)
        (before * torch.linspace(-1, 1, before.numel()).view_as(before)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = saved.model.run(live)
        assert not torch.equal(before, after)
        patch = attached.patch(root / f"attached-{number}.safetensors")
        assert patch.base.fingerprint == scores.base.fingerprint
        attached.detach()
        ns.apply(base, patch, out=root / f"trained-{number}")
        with torch.no_grad():
            found = saved.model.run(saved.load(root / f"trained-{number}"))
            torch.testing.assert_close(found, after, rtol=1e-5, atol=1e-6)
            assert torch.equal(saved.model.run(live), before)
