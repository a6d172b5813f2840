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
from neftsurgery.errors import NeftError
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


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


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
    before, after = saved.state(saved.model.load(base)), saved.state(saved.tuned)
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
    found, expected = saved.state(saved.model.load(root / "patched")), saved.state(saved.tuned)
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
    if "README.md" not in patch.not_carried:
        assert same(saved.state(saved.model.load(root / "lossless")), saved.state(saved.tuned))
    ns.revert(root / "lossless", patch, in_place=True)
    assert contents(root / "lossless") == {n: c for n, c in contents(base).items() if n in after}


def attachable(model: nn.Module, selection: ns.Selection, part: str) -> ns.Selection:
    """The tensors of a part that can be attached to a model today."""
    found = {}
    for name in selection.tensors:
        if split_part(name)[0] != part:
            continue
        one = ns.Selection({name: selection.tensors[name]}, selection.facts)
        try:
            ns.attach(model, one, base=False).detach()
        except NeftError:
            continue
        found[name] = selection.tensors[name]
    return ns.Selection(found, selection.facts)


def test_attached_neurons_train_and_their_patch_makes_the_same_outputs(saved: Saved) -> None:
    base, tuned, root = saved.root / "base", saved.root / "tuned", saved.root
    axis = given_axes(saved, ns.inspect(base))
    scores = ns.diff(base, tuned, axis=axis)
    live = saved.model.load(base)
    for number, (part, module) in enumerate(saved.model.parts(live).items()):
        module.eval()
        chosen = attachable(module, scores.select(neurons="100%"), part)
        assert chosen.tensors, part
        attached = ns.attach(module, chosen, base=base)
        optimizer = torch.optim.SGD(attached.parameters(), 0.1)
        if part in ("", "unet/", "2_Dense/"):
            saved.model.run(live).square().mean().backward()
        else:
            sum(row.square().sum() for row in attached.parameters()).backward()
        optimizer.step()
        patch = attached.patch(root / f"attached-{number}.safetensors")
        assert patch.base.fingerprint == ns.extract(base, tuned, changed=True).base.fingerprint
        with torch.no_grad():
            expected = saved.state(live)
        ns.apply(base, patch, out=root / f"trained-{number}")
        found = saved.state(saved.model.load(root / f"trained-{number}"))
        for name in chosen.tensors:
            live_name = name if name in expected else next(one for one in expected if one.endswith(name))
            assert torch.equal(found[live_name], expected[live_name]), name
        attached.detach()
