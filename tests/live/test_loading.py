"""Loading is what transformers' own classes do; what they cannot load is refused in one sentence."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from tuning_support import bert, bits, llama

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.live.loading import (
    load_model,
    load_tokenizer,
    meta_model,
    require_model_folder,
    require_quantization,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def with_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


@pytest.mark.parametrize("model_class", ["causal_lm", "saved"])
def test_a_model_with_its_weights(folder: Path, model_class: Any) -> None:
    model = load_model(ns.Checkpoint.open(folder), model_class)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert bits(model.state_dict()) == bits(llama().state_dict())
    assert model.name_or_path == str(folder)


def test_the_class_that_was_saved(tmp_path: Path) -> None:
    """Which has every weight of the files; and the bare model where transformers has no such class."""
    bert().save_pretrained(tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    assert type(load_model(base, "saved")) is BertForMaskedLM
    assert type(meta_model(base, "saved")) is BertForMaskedLM
    edit(tmp_path / "base", architectures=["OfSomeoneElse"])
    base = ns.Checkpoint.open(tmp_path / "base")
    assert type(meta_model(base, "saved")).__name__ == "BertModel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = ns.Checkpoint.open(tmp_path / "base")
    assert load_model(base, "causal_lm", dtype=dtype).dtype == dtype
    assert load_model(base, "causal_lm").dtype == torch.bfloat16


@pytest.mark.parametrize("model_class", ["causal_lm", "saved"])
def test_a_model_without_weights(folder: Path, model_class: Any) -> None:
    model = meta_model(ns.Checkpoint.open(folder), model_class)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: p.shape for name, p in llama().named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_a_tokenizer(folder: Path) -> None:
    with_tokenizer(folder)
    assert load_tokenizer(ns.Checkpoint.open(folder)).vocab_size == 3


def test_progress_bars_are_off_while_loading_and_as_before_after(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ns.Checkpoint.open(folder)
    logging.enable_progress_bar()
    load_model(base, "causal_lm")
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    load_model(base, "causal_lm")
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()


@pytest.mark.parametrize("options", [{"load_in_4bt": True}, {"quant_method": "no_such"}, {"load_in_4bit": 4}])
def test_options_to_quantize_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ns.UsageError, match=r"transformers cannot quantize the model: \w"):
        require_quantization(options)


def run_own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})


LOADERS: dict[str, Callable[[Checkpoint], Any]] = {
    "weights": lambda base: load_model(base, "causal_lm"),
    "weights, saved": lambda base: load_model(base, "saved"),
    "meta": lambda base: meta_model(base, "causal_lm"),
    "meta, saved": lambda base: meta_model(base, "saved"),
}
BROKEN: dict[str, Callable[[Path], None]] = {
    "an unknown type": lambda folder: edit(folder, model_type="unheard_of"),
    "no type": lambda folder: edit(folder, model_type=None),
    "its own code": run_own_code,
    "a size that is not a number": lambda folder: edit(folder, hidden_size="many"),
    "no heads": lambda folder: edit(folder, num_attention_heads=0, num_key_value_heads=0, head_dim=None),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_what_transformers_cannot_load(folder: Path, damage: Any, load: Any) -> None:
    damage(folder)
    with pytest.raises(ns.UsageError, match=r"transformers cannot load the model: \w") as caught:
        load(ns.Checkpoint.open(folder))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_size(folder: Path) -> None:
    edit(folder, intermediate_size=32)
    with pytest.raises(ns.MismatchError, match="a weight of another shape") as caught:
        load_model(ns.Checkpoint.open(folder), "causal_lm")
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert (caught.value.expected, caught.value.found) == ([16, 32], [16, 24])


@pytest.mark.parametrize(
    "load", [*LOADERS.values(), load_tokenizer, require_model_folder], ids=[*LOADERS, "tokenizer", "check"]
)
def test_what_is_not_a_folder_with_a_config(folder: Path, load: Any) -> None:
    expected = "expected a model folder with a config.json"
    with pytest.raises(ns.UsageError, match=f"{expected} .found a single file"):
        load(ns.Checkpoint.open(folder / "model.safetensors"))
    (folder / "config.json").unlink()
    with pytest.raises(ns.UsageError, match=f"{expected} .found no config.json"):
        load(ns.Checkpoint.open(folder))


def test_a_tokenizer_that_cannot_be_used(folder: Path) -> None:
    with pytest.raises(ns.UsageError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(ns.Checkpoint.open(folder))
    assert "tokenizer.json" in str(caught.value)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ns.UsageError, match="no tokenizer that transformers can load"):
        load_tokenizer(ns.Checkpoint.open(folder))


def test_weights_that_are_required(folder: Path) -> None:
    """A missing weight outside the required module is not an error, as in transformers."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(ns.Checkpoint.open(folder), "saved", required="model.layers") is not None
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ns.MismatchError, match=r"is not in its files \(missing weights: 1\)") as caught:
        load_model(ns.Checkpoint.open(folder), "saved", required="model.layers")
    assert caught.value.tensor == "model.layers.1.mlp.up_proj.weight"


def test_a_failure_of_the_machine_is_not_blamed_on_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    for load in LOADERS.values():
        with pytest.raises(OSError, match="Input/output error"):
            load(ns.Checkpoint.open(folder))
