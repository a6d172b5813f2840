"""A patch goes live, is switched, and comes off to the bit; the files with it are the same model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor
from tuning_support import FAMILIES, batch, bits, gpt2, llama, others, saved, select, vectors

import neftsurgery as ns

MODES = ("scatter", "overlay")
# Live, a patch may touch anything, not only what can be trained.
MORE = {"model.norm.weight": ([0], [0, 15]), "model.layers.1.mlp.gate_proj.weight": ([0], [0, 1])}


class Story:
    """A base on disk, and patches of it made by training different neurons."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.root = root
        self.base = root / "base"
        self.model = saved(llama().to(dtype), self.base)
        self.before = bits(self.model.state_dict())

    def patch(self, name: str, picks: Any, seed: int = 0) -> ns.Patch:
        """A patch with values drawn at random, made from files by `extract`."""
        model = type(self.model).from_pretrained(self.base, dtype="auto")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(self.root / f"{name} tuned")
        return ns.extract(self.base, self.root / f"{name} tuned", select(model, picks), out=self.root / name)

    def logits(self, patch: ns.Patch) -> Tensor:
        """Of the patched files."""
        ns.apply(self.base, patch, out=self.root / "patched", force=True)
        return type(self.model).from_pretrained(self.root / "patched", dtype="auto")(**batch()).logits

    def live(self) -> Tensor:
        return self.model(**batch()).logits


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def story(tmp_path: Path, request: pytest.FixtureRequest) -> Story:
    return Story(tmp_path, request.param)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "neftsurgery"):
        yield caplog


PICKS = FAMILIES["llama"][1]
OTHER = {
    "model.layers.0.mlp.up_proj.weight": ([0], [5, 6]),
    "model.layers.0.mlp.gate_proj.weight": ([0], [2]),
}


def test_on_and_off(story: Story) -> None:
    patch = story.patch("one", PICKS | MORE)
    expected = story.logits(patch)
    plain = story.live()
    with ns.attach(story.model, patch) as attached:
        assert torch.equal(story.live(), expected)
        assert not torch.equal(expected, plain)
        assert list(attached.parameters()) == []
        assert list(story.model.state_dict()) == list(story.before)
        assert "forward" not in story.model.lm_head.__dict__, (
            "values in the weight need no other forward pass"
        )
        assert all(p.requires_grad for p in story.model.parameters())
    assert bits(story.model.state_dict()) == story.before
    assert torch.equal(story.live(), plain)


def test_a_patch_by_its_path_or_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Story(tmp_path)
    path = story.patch("one", PICKS).path
    expected, plain = story.logits(ns.Patch.load(str(path))), story.live()
    asked = []

    def download(repo: str, filename: str, *, revision: str | None, force_download: bool) -> str:
        asked.append((repo, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with ns.attach(story.model, str(path)):
        assert torch.equal(story.live(), expected)
    assert asked == []
    with ns.attach(story.model, "org/patch@v1") as attached:
        assert torch.equal(story.live(), expected)
        attached.switch("org/patch")
        assert torch.equal(story.live(), expected)
    assert torch.equal(story.live(), plain)
    assert asked == [
        ("org/patch", "neuron_patch.safetensors", "v1"),
        ("org/patch", "neuron_patch.safetensors", None),
    ]


def test_overlay_leaves_the_weights_alone(story: Story) -> None:
    patch = story.patch("one", PICKS)
    expected = story.logits(patch)
    attached = ns.attach(story.model, patch, mode="overlay")
    tolerance = 1e-5 if expected.dtype == torch.float32 else 3e-2
    assert (story.live() - expected).norm() <= tolerance * expected.norm()
    assert bits(story.model.state_dict()) == story.before
    attached.detach()
    assert not any("forward" in module.__dict__ for module in story.model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_switching(story: Story, mode: Any) -> None:
    """Also where the two have neurons in common; and back, and off."""
    one, two = story.patch("one", PICKS, 1), story.patch("two", OTHER, 2)
    expected = {}
    for patch in (one, two):
        with ns.attach(story.model, patch, mode=mode):
            expected[patch] = story.live()
        if mode == "scatter":
            assert torch.equal(expected[patch], story.logits(patch))
    attached = ns.attach(story.model, one, mode=mode)
    for patch in (two, one, one, two):
        attached.switch(patch)
        assert torch.equal(story.live(), expected[patch])
        assert attached.selection.neurons == patch.neurons
    attached.detach()
    assert bits(story.model.state_dict()) == story.before


@pytest.mark.parametrize("mode", MODES)
def test_a_switch_that_fails_leaves_the_earlier_patch(tmp_path: Path, mode: Any) -> None:
    story = Story(tmp_path)
    one = story.patch("one", PICKS)
    foreign = Story(tmp_path / "foreign")
    with torch.no_grad():
        foreign.model.lm_head.weight.add_(1)
    foreign.model.save_pretrained(foreign.base)
    attached = ns.attach(story.model, one, mode=mode)
    expected = story.live()
    with pytest.raises(ns.MismatchError, match="another base"):
        attached.switch(foreign.patch("two", {"lm_head.weight": ([0], [1])}))
    assert torch.equal(story.live(), expected)
    attached.detach()
    assert bits(story.model.state_dict()) == story.before


@pytest.mark.parametrize("modes", [("scatter", "scatter"), ("overlay", "overlay"), ("scatter", "overlay")])
def test_several_at_once(story: Story, modes: Any) -> None:
    """Neurons of the same weights, none in common; they come off in any order."""
    one = story.patch("one", PICKS)
    apart = {
        name: (axes, [index[0] + 1, *([index[-1] + 1] if axes == [1] else [])])
        for name, (axes, index) in PICKS.items()
    }
    apart = {
        name: (axes, index) for name, (axes, index) in apart.items() if not set(index) & set(PICKS[name][1])
    }
    two = story.patch("two", apart, 2)
    first, second = (
        ns.attach(story.model, patch, mode=mode) for patch, mode in zip((one, two), modes, strict=True)
    )
    ns.apply(story.base, [one, two], out=story.root / "both")
    expected = type(story.model).from_pretrained(story.root / "both", dtype="auto")(**batch()).logits
    tolerance = 1e-5 if expected.dtype == torch.float32 else 3e-2
    assert (story.live() - expected).norm() <= tolerance * expected.norm()
    first.detach()
    remaining = story.logits(two)
    assert (story.live() - remaining).norm() <= tolerance * remaining.norm()
    second.detach()
    assert bits(story.model.state_dict()) == story.before


def test_neurons_in_common_are_refused(tmp_path: Path) -> None:
    story = Story(tmp_path)
    one, two = story.patch("one", PICKS, 1), story.patch("two", OTHER, 2)
    across = story.patch("three", {"model.layers.0.mlp.up_proj.weight": ([1], [0])})
    attached = ns.attach(story.model, one)
    now = bits(story.model.state_dict())
    with pytest.raises(ns.UsageError, match="1 of these neurons are attached already"):
        ns.attach(story.model, two)
    with pytest.raises(ns.UsageError, match="along the other axis"):
        ns.attach(story.model, across, mode="overlay")
    assert bits(story.model.state_dict()) == now
    attached.detach()
    ns.attach(story.model, two)


@pytest.mark.parametrize("mode", MODES)
def test_training_on_from_a_patch(tmp_path: Path, mode: Any) -> None:
    """The values start as the patch's; what comes out is a patch on the base, not on the patch."""
    story = Story(tmp_path)
    patch = story.patch("one", PICKS)
    expected = story.logits(patch)
    attached = ns.attach(story.model, patch, mode=mode, trainable=True)
    torch.testing.assert_close(story.live(), expected, rtol=1e-4, atol=1e-5)
    same = attached.patch(tmp_path / "same")
    for name, tensor in patch.tensors.items():
        assert (same.values(name) == patch.values(name)).all()
        assert same.tensors[name].base_hash == tensor.base_hash
    with pytest.raises(ns.UsageError, match="cannot be switched"):
        attached.switch(patch)
    attached.detach()
    assert bits(story.model.state_dict()) == story.before


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    """The file has one tensor for both; the live model too."""
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


def test_a_wider_live_type(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    """A patch of bfloat16 files on the model as float32 is checked by its digests all the same."""
    story = Story(tmp_path, torch.bfloat16)
    patch = story.patch("one", PICKS | MORE)
    model = type(story.model).from_pretrained(story.base, dtype=torch.float32)
    ns.apply(story.base, patch, out=tmp_path / "patched")
    expected = type(model).from_pretrained(tmp_path / "patched", dtype=torch.float32)(**batch()).logits
    before = bits(model.state_dict())
    with ns.attach(model, patch, base=False):
        assert torch.equal(model(**batch()).logits, expected)
    assert bits(model.state_dict()) == before
    assert not lines.records
    with torch.no_grad():
        model.lm_head.weight[2, 0] += 1e-6
    with pytest.raises(ns.MismatchError, match="1 of 2 live ones"):
        ns.attach(model, patch, base=False)


def test_a_narrower_live_type(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    """A patch of float32 files on the model as bfloat16: files check it; without them a warning says so."""
    story = Story(tmp_path)
    patch = story.patch("one", PICKS | MORE)
    model = type(story.model).from_pretrained(story.base, dtype=torch.bfloat16)
    ns.apply(story.base, patch, out=tmp_path / "patched")
    expected = type(model).from_pretrained(tmp_path / "patched", dtype=torch.bfloat16)(**batch()).logits
    with ns.attach(model, patch):
        assert torch.equal(model(**batch()).logits, expected)
    assert not lines.records
    with ns.attach(model, patch, base=False):
        assert torch.equal(model(**batch()).logits, expected)
    assert "cannot be checked" in lines.text
    with torch.no_grad():
        model.lm_head.weight[2, 0] += 1
    with pytest.raises(ns.MismatchError, match="1 of 2 live ones"):
        ns.attach(model, patch)


def test_a_damaged_patch_does_not_go_live(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.patch("one", {"lm_head.weight": ([0], [1])}).close()
    content = bytearray((tmp_path / "one").read_bytes())
    value = next(i for i in range(len(content) - 1, 0, -1) if content[i])
    content[value] ^= 1
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(ns.CorruptFileError, match="hash"):
        ns.attach(story.model, ns.Patch.load(tmp_path / "one"))
    assert bits(story.model.state_dict()) == story.before


def test_experts_in_one_tensor_go_live(tmp_path: Path) -> None:
    """Whatever the axes: only training asks how a module computes."""
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
    with pytest.raises(ns.UsageError, match="cannot be trained"):
        ns.attach(model, selection)
