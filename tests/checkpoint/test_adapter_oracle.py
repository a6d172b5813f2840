"""Every option of PEFT's LoraConfig: an adapter is read as PEFT merges it in float32, or refused by name.

The oracle is `PeftModel.from_pretrained(base, adapter).merge_and_unload()`, on models of transformers and of
plain layers.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapter_cases import CASES, EQUAL, MOVED, TARGETS, Case
from peft import LoraConfig, PeftModel, get_peft_model
from peft_support import tiny
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

import neftsurgery as ns
from neftsurgery.checkpoint.adapter import open_pair

pytestmark = pytest.mark.filterwarnings("ignore")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Made:
    """A base and an adapter on disk, and the name of the model that they are of."""

    base: Path
    adapter: Path
    model: str

    def truth(self) -> Arrays:
        """The merged weights, by PEFT."""
        loaded = PeftModel.from_pretrained(tiny(self.model), self.adapter)
        folder = self.adapter.with_name("merged")
        saved(loaded.merge_and_unload(), folder)
        return load_file(folder / "model.safetensors")


def saved(model: torch.nn.Module, folder: Path, config: dict[str, Any] | None = None) -> None:
    """A checkpoint of a model of transformers, or of plain layers."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def make(one: Case, root: Path) -> Made:
    """The base, and the adapter as PEFT saves it, or changed after that."""
    model = tiny(one.model)
    saved(model, root / "base", one.config)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[one.model]} | one.settings
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if one.train and ("lora_" in name or parameter.requires_grad):
            parameter.data += 0.1 * torch.randn_like(parameter)
    start = root / "start" if one.what == "converted" else None
    if start is not None:
        get_peft_model(tiny(one.model), LoraConfig(**settings)).save_pretrained(start)
    adapted.save_pretrained(root / "adapter", path_initial_model_for_weight_conversion=start)
    if one.change is not None:
        weights = root / "adapter/adapter_model.safetensors"
        save_file(one.change(load_tensors(weights)), weights)
    path = root / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (one.edits or {})))
    return Made(root / "base", root / "adapter", one.model)


def merged(made: Made) -> Arrays:
    """The tensors as this package reads them."""
    base, side = open_pair(made.base, made.adapter)
    found = {}
    for name, info in base.tensors.items():
        buffer = bytearray(info.nbytes)
        side.read_into(name, 0, memoryview(buffer))
        found[name] = np.frombuffer(buffer, np.float32).reshape(info.shape)
    return found


def assert_equal(found: Arrays, truth: Arrays) -> None:
    """The same tensors, up to the rounding of a float32 product."""
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        np.testing.assert_allclose(
            found[name], expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("one", CASES, ids=str)
def test_an_adapter_is_read_as_peft_merges_it_or_refused_by_name(one: Case, tmp_path: Path) -> None:
    made = make(one, tmp_path)
    if one.expected != EQUAL:
        with pytest.raises((ns.MismatchError, ns.CorruptFileError), match=re.escape(one.expected)):
            merged(made)
        return
    found, truth, base = merged(made), made.truth(), load_file(made.base / "model.safetensors")
    assert_equal(found, truth)
    moved = any(not np.array_equal(base[name], expected) for name, expected in truth.items())
    assert moved is (one.train and one.settings.get("lora_alpha") != 0)


@pytest.mark.parametrize("model", ["convolutions", "vit", "conv1d", "llama"])
def test_what_is_scored_and_cut_out_is_the_merged_model(model: str, tmp_path: Path) -> None:
    made = make(Case("peft_type", model, model=model), tmp_path)
    truth = made.truth()
    axis = {"layers.*.weight": 0} if model == "convolutions" else {}  # a base without a config
    scores, expected = (ns.diff(made.base, tuned, axis=axis) for tuned in (made.adapter, tmp_path / "merged"))
    assert scores.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        np.testing.assert_allclose(scores.values(name), expected.values(name), rtol=1e-4, atol=1e-6)
    patch = ns.extract(made.base, made.adapter, changed=True, axis=axis, out=tmp_path / "patch")
    ns.apply(made.base, patch, out=tmp_path / "patched")
    assert patch.neurons > 0
    assert_equal(load_file(tmp_path / "patched/model.safetensors"), truth)


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w2"]], ids=str)
def test_factors_of_single_experts_are_those_that_peft_stacks(tmp_path: Path, targets: list[str]) -> None:
    """As PEFT saved them before transformers stacked the experts of a model in memory."""
    model = tiny("moe")
    saved(model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = load_tensors(tmp_path / "base/model.safetensors")
    factors = {}
    for name, weight in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith(tuple(f".{target}.weight" for target in targets)):
            factors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1])
            factors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4)
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = Made(tmp_path / "base", adapter, "moe")
    assert_equal(merged(made), made.truth())


def test_every_field_of_loraconfig_and_every_init_is_decided() -> None:
    """A field that a later PEFT adds fails here until someone decides about it."""
    decided = {one.option for one in CASES}
    assert {one.name for one in dataclasses.fields(LoraConfig)} - decided == set()
    literal = next(
        one for one in typing.get_args(typing.get_type_hints(LoraConfig)[MOVED]) if one is not bool
    )
    inits = {one.replace("[number of iters]", "4") for one in typing.get_args(literal)}
    tried = {(one.settings | (one.edits or {})).get(MOVED) for one in CASES}
    assert inits - tried == set()


def test_the_page_says_how_many_are_equal() -> None:
    equal = sum(one.expected == EQUAL for one in CASES)
    counts = (
        f"Of {len(CASES)} adapters over every option of PEFT {peft.__version__}'s `LoraConfig`, {equal} are "
        f"read as `merge_and_unload` merges them in float32, {len(CASES) - equal} are refused by name, and "
        "none differs"
    )
    page = Path(__file__).resolve().parents[2] / "docs/lora.md"
    assert counts in " ".join(page.read_text(encoding="utf-8").split())
