"""A patch is attached and comes off to the bit; the model with it equals the patched files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from attach_support import MORE, OTHER, PICKS, ModelOnDisk
from tuning_support import batch, bits, gpt2, others, rows_of, saved, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")


def test_on_and_off(on_disk: ModelOnDisk) -> None:
    patch = on_disk.patch("one", PICKS | MORE)
    expected = on_disk.patched_logits(patch)
    plain = on_disk.live_logits()
    with ns.attach(on_disk.model, patch) as attached:
        assert torch.equal(on_disk.live_logits(), expected)
        assert not torch.equal(expected, plain)
        assert list(attached.parameters()) == []
        assert list(on_disk.model.state_dict()) == list(on_disk.before)
        assert "forward" not in on_disk.model.lm_head.__dict__, (
            "values in the weight need no other forward pass"
        )
        assert all(p.requires_grad for p in on_disk.model.parameters())
    assert bits(on_disk.model.state_dict()) == on_disk.before
    assert torch.equal(on_disk.live_logits(), plain)


def test_a_patch_by_its_path_or_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = ModelOnDisk(tmp_path)
    path = on_disk.patch("one", PICKS).path
    expected, plain = on_disk.patched_logits(ns.Patch.load(str(path))), on_disk.live_logits()
    asked = []

    def download(repo: str, filename: str, *, revision: str | None, force_download: bool) -> str:
        asked.append((repo, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with ns.attach(on_disk.model, str(path)):
        assert torch.equal(on_disk.live_logits(), expected)
    assert asked == []
    with ns.attach(on_disk.model, "org/patch@v1") as attached:
        assert torch.equal(on_disk.live_logits(), expected)
        attached.switch("org/patch")
        assert torch.equal(on_disk.live_logits(), expected)
    assert torch.equal(on_disk.live_logits(), plain)
    assert asked == [
        ("org/patch", "neuron_patch.safetensors", "v1"),
        ("org/patch", "neuron_patch.safetensors", None),
    ]


def test_overlay_leaves_the_weights_alone(on_disk: ModelOnDisk) -> None:
    patch = on_disk.patch("one", PICKS)
    expected = on_disk.patched_logits(patch)
    attached = ns.attach(on_disk.model, patch, mode="overlay")
    tolerance = 1e-5 if expected.dtype == torch.float32 else 3e-2
    assert (on_disk.live_logits() - expected).norm() <= tolerance * expected.norm()
    assert bits(on_disk.model.state_dict()) == on_disk.before
    attached.detach()
    assert not any("forward" in module.__dict__ for module in on_disk.model.modules())


@pytest.mark.parametrize("modes", [("scatter", "scatter"), ("overlay", "overlay"), ("scatter", "overlay")])
def test_several_at_once(on_disk: ModelOnDisk, modes: Any) -> None:
    """Two patches of the same weights, without common neurons, are detached in either order."""
    one = on_disk.patch("one", PICKS)
    apart = {
        name: (axes, [index[0] + 1, *([index[-1] + 1] if axes == [1] else [])])
        for name, (axes, index) in PICKS.items()
    }
    apart = {
        name: (axes, index) for name, (axes, index) in apart.items() if not set(index) & set(PICKS[name][1])
    }
    two = on_disk.patch("two", apart, 2)
    first, second = (
        ns.attach(on_disk.model, patch, mode=mode) for patch, mode in zip((one, two), modes, strict=True)
    )
    ns.apply(on_disk.folder, [one, two], out=on_disk.root / "both")
    expected = type(on_disk.model).from_pretrained(on_disk.root / "both", dtype="auto")(**batch()).logits
    tolerance = 1e-5 if expected.dtype == torch.float32 else 3e-2
    assert (on_disk.live_logits() - expected).norm() <= tolerance * expected.norm()
    first.detach()
    remaining = on_disk.patched_logits(two)
    assert (on_disk.live_logits() - remaining).norm() <= tolerance * remaining.norm()
    second.detach()
    assert bits(on_disk.model.state_dict()) == on_disk.before


def test_neurons_in_common_are_refused(tmp_path: Path) -> None:
    on_disk = ModelOnDisk(tmp_path)
    one, two = on_disk.patch("one", PICKS, 1), on_disk.patch("two", OTHER, 2)
    across = on_disk.patch("three", {"model.layers.0.mlp.up_proj.weight": ([1], [0])})
    attached = ns.attach(on_disk.model, one)
    now = bits(on_disk.model.state_dict())
    with pytest.raises(ns.UsageError, match="1 of these neurons are attached already"):
        ns.attach(on_disk.model, two)
    with pytest.raises(ns.UsageError, match="along the other axis"):
        ns.attach(on_disk.model, across, mode="overlay")
    assert bits(on_disk.model.state_dict()) == now
    attached.detach()
    ns.attach(on_disk.model, two)


@pytest.mark.parametrize("mode", MODES)
def test_training_on_from_a_patch(tmp_path: Path, mode: Any) -> None:
    """Training starts from the patch's values; the result is a patch on the base, not on the patch."""
    on_disk = ModelOnDisk(tmp_path)
    patch = on_disk.patch("one", PICKS)
    expected = on_disk.patched_logits(patch)
    attached = ns.attach(on_disk.model, patch, mode=mode, trainable=True)
    torch.testing.assert_close(on_disk.live_logits(), expected, rtol=1e-4, atol=1e-5)
    same = attached.patch(tmp_path / "same")
    for name, tensor in patch.tensors.items():
        assert (same.values(name) == patch.values(name)).all()
        assert same.tensors[name].base_hash == tensor.base_hash
    with pytest.raises(ns.UsageError, match="cannot be switched"):
        attached.switch(patch)
    attached.detach()
    assert bits(on_disk.model.state_dict()) == on_disk.before


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    """The file has one tensor for both uses; so has the live model."""
    model = saved(gpt2(), tmp_path / "base")
    before = bits(model.state_dict())
    picks = {"transformer.wte.weight": ([0], [4, 48])}
    tuned = gpt2()
    with torch.no_grad():
        tuned.transformer.wte.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", select(model, picks), out=tmp_path / "patch")
    ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    expected = type(model).from_pretrained(tmp_path / "patched")(**batch()).logits
    for mode in MODES:
        with ns.attach(model, patch, mode=mode):
            torch.testing.assert_close(model(**batch()).logits, expected)
    assert bits(model.state_dict()) == before


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """A patch may have any axes: only training depends on how a module computes."""
    model = torch.nn.Module()
    torch.manual_seed(0)
    model.experts = torch.nn.Parameter(torch.randn(3, 4, 5))
    from safetensors.torch import load_file, save_file

    save_file(model.state_dict(), tmp_path / "base")
    tuned = {"experts": model.experts.detach() + 1}
    save_file(tuned, tmp_path / "tuned")
    selection = select(model, {"experts": ([0, 2], [0, 4, 7, 14])})
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", selection, out=tmp_path / "patch")
    ns.apply(tmp_path / "base", patch, out=tmp_path / "patched")
    before = model.experts.detach().clone()
    with ns.attach(model, patch):
        assert torch.equal(model.experts, load_file(tmp_path / "patched")["experts"])
        now = model.experts.detach()
        assert torch.equal(vectors(now, [0, 2], [4]), vectors(before, [0, 2], [4]) + 1)
        assert torch.equal(others(now, [0, 2], [0, 4, 7, 14]), others(before, [0, 2], [0, 4, 7, 14]))
    assert torch.equal(model.experts, before)
    with ns.attach(model, selection) as attached:
        (2 * model.experts.square()).sum().backward()
        torch.testing.assert_close(
            rows_of(attached, "experts").grad, 4 * vectors(before, [0, 2], [0, 4, 7, 14])
        )
