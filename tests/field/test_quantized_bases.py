"""Chosen neurons on bases of bitsandbytes and torchao, beside plain torch on the dequantized weights."""

from __future__ import annotations

import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig, Trainer, TrainingArguments

import neftsurgery as ns
from neftsurgery.peft.base_vectors import quantization_of
from neftsurgery.peft.config import NeftConfig
from neftsurgery.peft.layer import NeftLayer
from neftsurgery.tuning.forwards import keep_gradients

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(36).view(4, 9)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = ("nf4", "int8", "torchao")


def quantization(kind: str) -> Any:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def load(base: Path, kind: str | None = None) -> Any:
    options = {} if kind is None else {"quantization_config": quantization(kind)}
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def dequantized(base: Path, model: Any) -> Any:
    """A plain model with the values that the weights of a quantized one stand for."""
    plain = load(base)
    keep_gradients(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (way := quantization_of(model, module)) is not None:
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(way.get_base_weight(module).float())
    return plain


def neurons_of(model: Any) -> dict[str, tuple[int, Tensor, nn.Parameter]]:
    """Of each weight: the axis of its neurons, their numbers, and their values, however they got there."""
    if isinstance(model, ns.Attached):
        rows = dict(model.named_parameters())
        found = {}
        for name, chosen in model.selection.tensors.items():
            (own,) = (one for key, one in rows.items() if key.startswith(name))
            found[name] = chosen.layout.axes[0], torch.from_numpy(chosen.index), own
        return found
    return {
        one.name: (one.layout.axes[0], one.neft_index["default"], one.neft_rows["default"])
        for one in model.modules()
        if isinstance(one, NeftLayer)
    }


def chosen(base: Path, model: Any, anatomy: str, way: str) -> Any:
    options = {"neurons": "10%", "anatomy": anatomy}
    if way == "peft":
        return get_peft_model(model, NeftConfig(**options))
    selection = ns.diff(base, base, anatomy=anatomy, score="random").select(neurons="10%")
    return ns.attach(model, selection)


@pytest.mark.parametrize("way", ["attach", "peft"])
@pytest.mark.parametrize("anatomy", ["rows", "ffn"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_outputs(base: Path, kind: str, anatomy: str, way: str) -> None:
    model = load(base, kind)
    plain, files = dequantized(base, model), load(base)
    tuned = chosen(base, model, anatomy, way)
    neurons = neurons_of(tuned)
    with torch.no_grad():
        for name, (axis, index, rows) in neurons.items():  # they start from the files, not the codes
            whole = files.get_parameter(name).movedim(axis, 0)[index].flatten(1)
            assert torch.equal(rows, whole), name
            rows += 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
            plain.get_parameter(name).movedim(axis, 0)[index] = rows
    # LLM.int8 rounds activations too; torch's own dtype rounds the rest.
    near = {"rtol": 0.1, "atol": 0.02} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(model), logits(plain), **near)  # an evaluation first, as trainers do
    model.train()
    for each in (model, plain):
        each(input_ids=IDS).logits.square().mean().backward()
    for name, (axis, index, rows) in neurons.items():
        expected = plain.get_parameter(name).grad.movedim(axis, 0)[index].flatten(1)
        assert rows.grad is not None
        scale = float(expected.abs().max())
        near = {"rtol": 0.3, "atol": 0.1 * scale} if kind == "int8" else {"rtol": 1e-3, "atol": 1e-4 * scale}
        torch.testing.assert_close(rows.grad, expected, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_by_weights(base: Path, kind: str) -> None:
    model = load(base, kind)
    options = {"neurons": 40, "policy": "norm"}
    expected = get_peft_model(dequantized(base, model), NeftConfig(**options))
    found = get_peft_model(model, NeftConfig(**options))
    assert found.peft_config["default"].counts == expected.peft_config["default"].counts
    for name, (_, index, _) in neurons_of(expected).items():
        assert torch.equal(neurons_of(found)[name][1], index)


def trained(model: Any, folder: Path, **more: Any) -> Any:
    rows = [{"input_ids": IDS[n % 4], "labels": IDS[n % 4]} for n in range(8)]
    args = TrainingArguments(
        folder, max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no",
        eval_strategy="steps", eval_steps=1, eval_on_start=True, disable_tqdm=True,
    )  # fmt: skip

    class PatchTrainer(ns.PatchSaving, Trainer): ...

    make = PatchTrainer if "attached" in more else Trainer
    trainer = make(model, args=args, train_dataset=rows, eval_dataset=rows, **more)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_fits_the_original_files(base: Path, kind: str, tmp_path: Path) -> None:
    model = trained(get_peft_model(load(base, kind), NeftConfig(neurons="10%")), tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(base, kind), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))
    patch = ns.Patch.from_adapter(tmp_path / "adapter", base, tmp_path / "patch.safetensors")
    assert ns.verify(base, patch).state == "base"
    ns.apply(base, patch, out=tmp_path / "patched")
    onto_files = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(onto_files), logits(load(tmp_path / "patched")), rtol=0.02, atol=0.02)
    before = logits(model)
    assert (
        torch.nn.functional.cosine_similarity(before, logits(model.merge_and_unload()), dim=-1).min() > 0.98
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_saves_patches(base: Path, kind: str, tmp_path: Path) -> None:
    model = load(base, kind)
    selection = ns.diff(base, base, score="random").select(neurons="10%")
    attached = ns.attach(model, selection)
    trained(model, tmp_path / "run", attached=attached)
    assert not getattr(model, "_hf_peft_config_loaded", False)
    patch = attached.patch(tmp_path / "patch.safetensors")
    assert ns.verify(base, patch).state == "base"
    before = logits(model)
    with ns.attach(load(base, kind), patch) as again:
        torch.testing.assert_close(logits(again.model), before, rtol=0.02, atol=0.02)


def test_an_adapter_of_other_files_gets_a_warning(base: Path, tmp_path: Path) -> None:
    get_peft_model(load(base, "nf4"), NeftConfig(neurons="10%")).save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    LlamaForCausalLM(load(base).config).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="trained on other files"):
        PeftModel.from_pretrained(load(tmp_path / "other", "nf4"), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(load(base, "nf4"), tmp_path / "adapter")


def test_neurons_without_the_files_of_the_base(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(base, "nf4")
    plain = dequantized(base, model)
    model.name_or_path = model.config._name_or_path = ""
    found = neurons_of(get_peft_model(model, NeftConfig(neurons="10%")))
    assert "start from dequantized values" in caplog.text
    for name, (_, index, rows) in found.items():
        assert torch.equal(rows, plain.get_parameter(name)[index])


def test_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes_support import make

    make(tmp_path / "model", 2)
    recipes = Path(__file__).parents[2] / "recipes"
    data = str(recipes / "data" / "sums.jsonl")
    recipe = {
        "model": str(tmp_path / "model"), "out": str(tmp_path / "run"), "control": "random",
        "data": {"train": data, "eval": data, "prompt": "{question}", "completion": " {answer}"},
        "probe": {"steps": 2}, "select": {"neurons": "10%"},
        "train": {
            "steps": 4, "learning_rate": 1e-2,
            "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        },
    }  # fmt: skip
    result = ns.train(recipe)
    assert result.dev_loss < result.base_dev_loss
    patch = ns.Patch.load(result.patch)
    assert patch.manifest["training"]["quantization"]["load_in_4bit"]
    ns.apply(tmp_path / "model", patch, out=tmp_path / "patched")

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["carry_over.py", str(tmp_path / "recipe.yaml")])
    runpy.run_path(str(recipes / "carry_over.py"), run_name="__main__")
    losses = dict(re.findall(r"^(\w.*?) +(\d\.\d{4})$", capsys.readouterr().out, re.MULTILINE))
    assert list(losses) == ["quantized", "quantized, patched", "files", "files, patched"]
    assert losses["files, patched"] < losses["files"]
    assert losses["quantized, patched"] < losses["quantized"]
