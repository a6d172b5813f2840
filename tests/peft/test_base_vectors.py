"""An adapter and its base: another base is refused, wherever the two meet."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import neftsurgery as ns
from neftsurgery.errors import MismatchError, NeftError
from neftsurgery.peft.config import NeftConfig

# PEFT calls deprecated functions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, tie_word_embeddings=False)).bfloat16()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(llama(), NeftConfig(neurons="10%"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 if parameter.requires_grad else 0
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_digest_is_of_the_base(adapter: Path) -> None:
    stored = load_file(adapter / "adapter_model.safetensors")
    state = llama().state_dict()
    for key in (key for key in stored if key.endswith("neft_digest")):
        stem = key.removesuffix(".neft_digest")
        weight = state[f"{stem.removeprefix('base_model.model.')}.weight"]
        raw = weight[stored[f"{stem}.neft_index"]].view(torch.int16).numpy().tobytes()
        assert stored[key].numpy().tobytes() == xxhash.xxh3_128(raw).digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_its_own_base_in_any_dtype(adapter: Path, dtype: torch.dtype) -> None:
    PeftModel.from_pretrained(llama().to(dtype), adapter)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_another_base_is_refused(adapter: Path, low_memory: bool, trainable: bool) -> None:
    with pytest.raises(MismatchError, match="trained on another base") as caught:
        PeftModel.from_pretrained(llama(1), adapter, low_cpu_mem_usage=low_memory, is_trainable=trainable)
    assert caught.value.tensor.startswith("model.layers.0.")


def test_a_base_that_another_adapter_was_merged_into(adapter: Path) -> None:
    merged = PeftModel.from_pretrained(llama(), adapter).merge_and_unload()
    with pytest.raises(MismatchError, match="trained on another base"):
        PeftModel.from_pretrained(merged, adapter)


def test_float16_cannot_tell(adapter: Path) -> None:
    with pytest.warns(UserWarning, match="float16 does not hold the base's values, or"):
        PeftModel.from_pretrained(llama(1).half(), adapter)


def test_files_of_another_base(adapter: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    llama(1).save_pretrained(tmp_path / "other")
    patch = ns.Patch.from_adapter(adapter, tmp_path / "base", tmp_path / "patch.safetensors")
    with pytest.raises(MismatchError, match="trained on another base"):
        ns.Patch.from_adapter(adapter, tmp_path / "other")
    with pytest.raises(MismatchError, match="made from another base"):
        patch.to_adapter(tmp_path / "made", tmp_path / "other")
    assert not (tmp_path / "made").exists()
    patch.to_adapter(tmp_path / "made", tmp_path / "base")
    made, first = (load_file(one / "adapter_model.safetensors") for one in (tmp_path / "made", adapter))
    assert made.keys() == first.keys()
    for key in (key for key in made if key.endswith("neft_digest")):
        assert np.array_equal(made[key], first[key])


def test_a_newer_version_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(NeftError, match="newer version of neftsurgery"):
        PeftModel.from_pretrained(llama(), adapter)


def test_neurons_of_plain_weights_need_no_files(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        get_peft_model(llama(), NeftConfig(neurons="10%"))
    assert not caplog.records
