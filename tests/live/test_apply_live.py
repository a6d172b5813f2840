"""A patch in a live model: to the bit the patched checkpoint, or nothing at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import neftsurgery as ns
from neftsurgery.live.loading import without_progress_bars

State = dict[str, torch.Tensor]


def state(seed: int = 0, moved: float = 0.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(9)
    return {
        name: (torch.randn(shape, generator=generator) + moved * torch.randn(shape, generator=noise)).to(
            dtype
        )
        for name, shape, dtype in (
            ("0.weight", (20, 12), torch.bfloat16),
            ("0.bias", (20,), torch.bfloat16),
            ("1.weight", (5, 20), torch.float32),
            ("1.running", (7,), torch.float16),
        )
    }


class Model(nn.Module):
    """Its names are those of `state`; one of them is a buffer."""

    def __init__(self, tensors: State) -> None:
        super().__init__()
        for number in "01":
            part = nn.Module()
            self.add_module(number, part)
            for name, value in tensors.items():
                if name.startswith(number) and name.endswith("running"):
                    part.register_buffer("running", value.clone())
                elif name.startswith(number):
                    part.register_parameter(name[2:], nn.Parameter(value.clone()))


def same(a: State, b: State) -> bool:
    return all(
        torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        for name in b
    )


def copied(tensors: State) -> State:
    return {name: value.clone() for name, value in tensors.items()}


@pytest.fixture
def patches(tmp_path: Path) -> dict[str, ns.Patch | ns.LosslessPatch]:
    base, tuned = state(), state(moved=1e-2)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    return {
        "lossless": ns.extract(base, tuned, lossless=True),
        "fast": ns.extract(*files, lossless=True, fast=True),
        "rows": ns.extract(*files, neurons="40%", score="random", only=["*.weight"]),
        "columns": ns.extract(*files, neurons="40%", score="random", only=["*.weight"], axis={"*": 1}),
    }


@pytest.mark.parametrize("kind", ["lossless", "fast", "rows", "columns"])
def test_a_live_model_becomes_the_patched_checkpoint(
    patches: dict[str, ns.Patch | ns.LosslessPatch], tmp_path: Path, kind: str
) -> None:
    patch = patches[kind]
    ns.apply(tmp_path / "base.safetensors", patch, out=tmp_path / "out.safetensors")
    wanted = load_file(tmp_path / "out.safetensors")
    assert not same(state(), wanted)
    model, mapping = Model(state()), state()
    places = [tensor.data_ptr() for tensor in mapping.values()]
    for _ in range(2):  # twice is once
        ns.apply_live(model, patch)
        ns.apply_live(mapping, patch)
        assert same(model.state_dict(), wanted)
        assert same(mapping, wanted)
    assert [tensor.data_ptr() for tensor in mapping.values()] == places


@pytest.mark.parametrize("kind", ["lossless", "fast", "rows", "columns"])
def test_another_base_is_not_changed(patches: dict[str, ns.Patch | ns.LosslessPatch], kind: str) -> None:
    """The last tensor alone differs: those before it stay as they are, too."""
    patch = patches[kind]
    other = state()
    other["1.weight"] += 1
    before = copied(other)
    with pytest.raises(ns.MismatchError, match=r"1\.weight: .* another base than this model"):
        ns.apply_live(other, patch)
    assert same(other, before)


def test_a_tensor_that_the_patch_leaves_alone_is_checked_too() -> None:
    base, tuned = state(), state(moved=1e-2)
    tuned["0.bias"] = base["0.bias"].clone()
    other = copied(base)
    other["0.bias"] += 1
    before = copied(other)
    with pytest.raises(ns.MismatchError, match=r"0\.bias: .* another base than this model"):
        ns.apply_live(other, ns.extract(base, tuned, lossless=True))
    assert same(other, before)


def test_other_tensors_are_refused(patches: dict[str, ns.Patch | ns.LosslessPatch]) -> None:
    lacking = state()
    del lacking["0.bias"]
    with pytest.raises(ns.MismatchError, match="no such tensor"):
        ns.apply_live(lacking, patches["lossless"])
    wide = state() | {"0.weight": state()["0.weight"].float()}
    with pytest.raises(ns.MismatchError, match=r"expected BF16 \[20, 12\], found F32"):
        ns.apply_live(wide, patches["rows"])


def test_a_partly_patched_model_is_completed(patches: dict[str, ns.Patch | ns.LosslessPatch]) -> None:
    half, tuned = state(), state(moved=1e-2)
    half["0.weight"] = tuned["0.weight"].clone()
    ns.apply_live(half, patches["lossless"])
    assert same(half, tuned)


def test_a_patch_from_memory_is_the_patch_of_the_files(tmp_path: Path) -> None:
    base, tuned = state(), state(moved=1e-2)
    ns.extract(base, tuned, lossless=True, reversible=True, out=tmp_path / "p").close()
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    ns.extract(arrays, {"w": arrays["w"] + 1}, lossless=True, out=tmp_path / "q").close()
    found = {name: tensor.clone() for name, tensor in base.items()}
    ns.apply_live(found, tmp_path / "p")
    assert same(found, tuned)
    save_file(base, tmp_path / "b.safetensors")
    ns.apply(tmp_path / "b.safetensors", tmp_path / "p", out=tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), tuned)
    live = {"w": torch.from_numpy(arrays["w"].copy())}
    ns.apply_live(live, tmp_path / "q")
    np.testing.assert_array_equal(live["w"].numpy(), arrays["w"] + 1)


def experts() -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=50, num_key_value_heads=2, num_local_experts=3, tie_word_embeddings=False, **sizes
    )
    return transformers.MixtralForCausalLM(config).to(torch.bfloat16)


def moved(model: Any) -> Any:
    """A copy with other values in some of its weights."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "experts" in name or "v_proj" in name:
            parameter.data += torch.rand_like(parameter).round() / 8
    return other


@pytest.mark.parametrize("kind", ["lossless", "rows"])
def test_merged_experts_become_those_of_the_patched_files(tmp_path: Path, kind: str) -> None:
    """A patch of files, in which each expert has its own tensors, put into a model that has merged them."""
    import transformers

    base = experts()
    tuned = moved(base)
    with without_progress_bars():
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    chosen: dict[str, Any] = (
        {"lossless": True} if kind == "lossless" else {"neurons": "30%", "score": "random"}
    )
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", **chosen)
    ns.apply(tmp_path / "base", patch, out=tmp_path / "out")
    with without_progress_bars():
        wanted = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    for model in (base, loaded):
        for _ in range(2):
            ns.apply_live(model, patch)
            assert same(model.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("kind", ["lossless", "rows"])
def test_another_base_with_merged_experts_is_not_changed(tmp_path: Path, kind: str) -> None:
    """One element of the last expert alone differs."""
    base = experts()
    tuned = moved(base)
    with without_progress_bars():
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    chosen: dict[str, Any] = (
        {"lossless": True} if kind == "lossless" else {"neurons": "100%", "score": "random"}
    )
    patch = ns.extract(tmp_path / "base", tmp_path / "tuned", **chosen)
    base.get_parameter("model.layers.1.mlp.experts.gate_up_proj").data[2, 47, 15] += 1
    before = copied(base.state_dict())
    with pytest.raises(
        ns.MismatchError, match=r"1\.block_sparse_moe\.experts\.2\.w3\.weight: .* another base"
    ):
        ns.apply_live(base, patch)
    assert same(base.state_dict(), before)


def test_a_split_tensor_is_put_into_all_its_weights(tmp_path: Path) -> None:
    """nomic's files have one tensor for queries, keys and values, the model three."""
    import transformers

    config = transformers.NomicBertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    base = transformers.NomicBertModel(config)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data += torch.rand_like(parameter)
    with without_progress_bars():
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
    assert any("Wqkv" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    for kind, chosen in {"rows": {"neurons": "40%", "score": "random"}, "all": {"lossless": True}}.items():
        patch = ns.extract(tmp_path / "base", tmp_path / "tuned", **chosen)
        ns.apply(tmp_path / "base", patch, out=tmp_path / kind)
        model = copy.deepcopy(base)
        ns.apply_live(model, patch)
        with without_progress_bars():
            wanted = transformers.NomicBertModel.from_pretrained(tmp_path / kind)
        assert same(model.state_dict(), wanted.state_dict())
    assert same(model.state_dict(), tuned.state_dict())
