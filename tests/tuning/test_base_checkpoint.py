"""Which base a model has, and whether its weights and a patch are those of this base."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from attach_support import MORE, PICKS, ModelOnDisk
from parts_support import unet, write_pipeline
from safetensors.torch import load_file
from torch import nn
from tuning_support import batch, bits, llama, saved, select

import neftsurgery as ns

UP = "model.layers.0.mlp.up_proj.weight"


def test_a_base_that_is_another(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path / "base")
    chosen = select(model, {UP: ([0], [1, 2, 3])})
    with torch.no_grad():
        model.get_parameter(UP)[2, 0] += 1
    with pytest.raises(ns.MismatchError, match="1 of 3 that differ") as caught:
        ns.attach(model, chosen)
    assert "base=False" in str(caught.value)
    assert str(tmp_path / "base") in str(caught.value)
    with ns.attach(model, chosen, base=False) as attached, attached.patch() as patch:
        assert patch.base["fingerprint"] is None
    model = saved(llama(intermediate_size=32), tmp_path / "other")
    with pytest.raises(ns.MismatchError, match=r"found F32 \[24, 16\]"):
        ns.attach(model, select(model, {UP: ([0], [1])}), base=tmp_path / "base")
    with pytest.raises(ns.UsageError, match="no such file"):
        ns.attach(model, select(model, {UP: ([0], [1])}), base=tmp_path / "nowhere")


def test_a_base_whose_files_are_gone(tmp_path: Path) -> None:
    """Then the live weights are the base."""
    model = saved(llama(), tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with ns.attach(model, select(model, {UP: ([0], [1])})) as attached, attached.patch() as patch:
        assert patch.base == {"name": "base", "fingerprint": None}
        assert ns.verify(tmp_path / "moved", patch).state == "patched"  # nothing was trained: both


def test_the_hub_cache_is_found_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model from the Hub names its repository. Its files are in the cache; nothing is downloaded."""
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123abcd"
    model = saved(llama(), snapshot)
    model.name_or_path = model.config._name_or_path = "org/name"
    found = str(snapshot / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with ns.attach(model, select(model, {UP: ([0], [1])})) as attached, attached.patch() as patch:
        assert (patch.base["repo"], patch.base["revision"]) == ("org/name", "0123abcd")
        assert patch.base["fingerprint"] is not None


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "neftsurgery"):
        yield caplog


def test_a_wider_live_type(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    """A patch of bfloat16 files is checked by its digests also on a float32 model."""
    on_disk = ModelOnDisk(tmp_path, torch.bfloat16)
    patch = on_disk.patch("one", PICKS | MORE)
    model = type(on_disk.model).from_pretrained(on_disk.folder, dtype=torch.float32)
    ns.apply(on_disk.folder, patch, out=tmp_path / "patched")
    expected = type(model).from_pretrained(tmp_path / "patched", dtype=torch.float32)(**batch()).logits
    before = bits(model.state_dict())
    with ns.attach(model, patch, base=False):
        assert torch.equal(model(**batch()).logits, expected)
    assert bits(model.state_dict()) == before
    assert not lines.records
    with torch.no_grad():
        model.lm_head.weight[2, 0] += 1e-6
    with pytest.raises(ns.MismatchError, match="1 of 2 vectors that differ"):
        ns.attach(model, patch, base=False)


def test_a_narrower_live_type(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    """A patch of float32 files on a bfloat16 model is checked against the files, or there is a warning."""
    on_disk = ModelOnDisk(tmp_path)
    patch = on_disk.patch("one", PICKS | MORE)
    model = type(on_disk.model).from_pretrained(on_disk.folder, dtype=torch.bfloat16)
    ns.apply(on_disk.folder, patch, out=tmp_path / "patched")
    expected = type(model).from_pretrained(tmp_path / "patched", dtype=torch.bfloat16)(**batch()).logits
    with ns.attach(model, patch):
        assert torch.equal(model(**batch()).logits, expected)
    assert not lines.records
    with ns.attach(model, patch, base=False):
        assert torch.equal(model(**batch()).logits, expected)
    assert "cannot be checked" in lines.text
    with torch.no_grad():
        model.lm_head.weight[2, 0] += 1
    with pytest.raises(ns.MismatchError, match="1 of 2 vectors that differ"):
        ns.attach(model, patch)


def test_a_damaged_patch_is_refused(tmp_path: Path) -> None:
    on_disk = ModelOnDisk(tmp_path)
    on_disk.patch("one", {"lm_head.weight": ([0], [1])}).close()
    content = bytearray((tmp_path / "one").read_bytes())
    value = next(i for i in range(len(content) - 1, 0, -1) if content[i])
    content[value] ^= 1
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(ns.CorruptFileError, match="hash"):
        ns.attach(on_disk.model, ns.Patch.load(tmp_path / "one"))
    assert bits(on_disk.model.state_dict()) == on_disk.before


# A part of a checkpoint made of several models.


class Net(nn.Module):
    """The module of `parts_support.unet`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.down_blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(4, 8, bias=False)})}) for _ in range(2)
        )


@pytest.mark.parametrize("named", ["", "unet"])
def test_a_part_is_attached_by_itself_and_its_patch_is_for_the_whole(tmp_path: Path, named: str) -> None:
    base, tuned = write_pipeline(tmp_path / "base"), write_pipeline(tmp_path / "tuned", 0.25)
    patch = ns.extract(base, tuned, changed=True, only=["unet/*"], axis={"*conv*": 0})
    live = Net()
    live.load_state_dict(load_file(base / "unet" / "diffusion_pytorch_model.safetensors"))
    with ns.attach(live, patch, base=base / named):
        assert torch.equal(live.conv_in.weight, torch.from_numpy(unet()["conv_in.weight"] + np.float32(0.25)))
    with ns.attach(live, patch.selection, base=base / named) as attached:
        for rows in attached.parameters():
            rows.data += 1
        trained = attached.patch()
    assert trained.base == patch.base
    assert trained.tensors.keys() == patch.tensors.keys()
    assert ns.verify(base, trained).state == "base"
