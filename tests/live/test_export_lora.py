"""Adapters for the live model: PEFT loads and merges them, whatever names and layouts the files have."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import Result, snapshot

import neftsurgery as ns

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:fan_in_fan_out"
)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER: dict[str, Any] = SMALL | {"vocab_size": 50, "num_key_value_heads": 2, "max_position_embeddings": 32}


def vit() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SMALL))


def llama(layers: int = 2) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | {"num_hidden_layers": layers}))


def untied_gpt2() -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, **ends))


def gpt_oss() -> Any:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER | experts))


def mixtral() -> Any:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER | experts))


def wav2vec2() -> Any:
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return tf.Wav2Vec2Model(tf.Wav2Vec2Config(vocab_size=20, **convolutions, **positions, **SMALL))


def saved(make: Any, tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A checkpoint, and one with other weights."""
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 4 * (torch.rand_like(parameter) - 0.5)  # changes signs: not all rounds back
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


def cut(sides: tuple[Path, Path], out: Path, **options: Any) -> ns.Patch:
    usual = {"neurons": "20%", "policy": "random", "per": "tensor", "reversible": True}
    return ns.extract(*sides, out=out, **(usual | options))


def loaded(path: Path) -> Any:
    (name,) = tf.AutoConfig.from_pretrained(path).architectures
    return getattr(tf, name).from_pretrained(path, dtype="auto").eval()


def adapted(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded(base), adapter)


def values(model: Any) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def inexact_merge(base: Path, patch: ns.Patch, folder: Path) -> int:
    """How many elements PEFT merges to others than `apply`; each is off by one rounding."""
    ns.apply(base, patch, out=folder / "applied")
    old, new = values(loaded(base)), values(loaded(folder / "applied"))
    found = values(adapted(base, folder / "adapter").merge_and_unload())
    assert found.keys() == new.keys()
    kinds = {name: value.dtype for name, value in loaded(base).state_dict().items()}
    inexact = 0
    for name, value in new.items():
        eps = torch.finfo(kinds[name]).eps
        assert (np.abs(found[name] - value) <= eps * (np.abs(value) + np.abs(old[name]))).all(), name
        inexact += int((found[name] != value).sum())
    assert any((new[name] != old[name]).any() for name in new)
    return inexact


EVERYTHING = {"include": ["*"]}
CASES: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "vit": (vit, {"exclude": ["*embeddings"]}, {"linear", "convolution"}),
    "llama": (llama, EVERYTHING, {"linear", "embedding"}),
    "gpt2": (untied_gpt2, EVERYTHING, {"linear", "embedding"}),
    "gpt_oss": (gpt_oss, {}, {"linear", "parameter"}),
    "gpt_oss, units": (gpt_oss, {"anatomy": "units", "per": "model"}, {"linear", "parameter"}),
    "mixtral": (mixtral, {}, {"linear", "parameter"}),
    "mixtral, units": (mixtral, {"anatomy": "units", "per": "model"}, {"linear", "parameter"}),
    "wav2vec2": (wav2vec2, {"exclude": ["*pos_conv*"]}, {"linear", "convolution"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize(("make", "options", "forms"), CASES.values(), ids=CASES)
def test_peft_merges_an_export_to_what_apply_gives(
    tmp_path: Path, make: Any, options: dict[str, Any], forms: set[str], dtype: torch.dtype
) -> None:
    """In every form, but for the elements that are counted."""
    base, tuned = saved(make, tmp_path, dtype)
    patch = cut((base, tuned), tmp_path / "p", **options)
    done = ns.export_lora(patch, tmp_path / "adapter", base=base)
    assert {module.place.form for module in done.modules} == forms
    assert inexact_merge(base, patch, tmp_path) == done.inexact
    assert (done.inexact > 0) or dtype == torch.bfloat16
    assert done.elements == patch.parameters


def test_each_module_has_its_own_rank(tmp_path: Path) -> None:
    """By patterns of whole names: those of layer 1 are not for layer 11."""
    base, tuned = saved(lambda: llama(12), tmp_path)
    patch = cut((base, tuned), tmp_path / "p", per="model", neurons="6%")
    padded = ns.export_lora(patch, tmp_path / "padded", base=base)
    done = ns.export_lora(patch, tmp_path / "adapter", base=base, rank_pattern=True)
    ranks = {module.place.path: module.rank for module in done.modules}
    assert ranks == {name.removesuffix(".weight"): part.count for name, part in patch.tensors.items()}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == max(ranks.values()) == done.rank
    model = adapted(base, tmp_path / "adapter")
    for path, rank in ranks.items():
        module = model.get_submodule(f"base_model.model.{path}")
        assert (module.r["default"], module.scaling["default"]) == (rank, 1), path
    assert inexact_merge(base, patch, tmp_path) == done.inexact == padded.inexact
    assert done.nbytes < 0.5 * padded.nbytes
    with pytest.raises(ns.UsageError, match="do not go together"):
        ns.export_lora(patch, tmp_path / "both", base=base, rank_pattern=True, rank=8)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_shorter_factors_round_the_differences_and_are_counted(tmp_path: Path, dtype: str) -> None:
    base, tuned = saved(llama, tmp_path, torch.bfloat16)
    patch = cut((base, tuned), tmp_path / "p", **EVERYTHING)
    exact = ns.export_lora(patch, tmp_path / "long", base=base)
    done = ns.export_lora(patch, tmp_path / "adapter", base=base, dtype=dtype)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {one.dtype for one in factors.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    assert inexact_merge(base, patch, tmp_path) == done.inexact > exact.inexact
    assert f"{done.inexact:,} of {done.elements:,}" in done.exactness
    assert done.nbytes < 0.51 * exact.nbytes + 20_000


def test_a_difference_too_large_for_f16_is_refused(tmp_path: Path) -> None:
    base, _ = saved(llama, tmp_path)
    model = loaded(base)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(tmp_path / "large")
    patch = ns.extract(base, tmp_path / "large", changed=True, reversible=True, out=tmp_path / "p")
    with pytest.raises(ns.MismatchError, match=r"dtype='f32'"):
        ns.export_lora(patch, tmp_path / "adapter", base=base, dtype="f16")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ns.UsageError, match="unknown dtype"):
        ns.export_lora(patch, tmp_path / "adapter", base=base, dtype="int8")


def test_an_adapter_that_peft_would_not_take_is_not_written(tmp_path: Path) -> None:
    base, tuned = saved(llama, tmp_path)
    patch = cut((base, tuned), tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(ns.MismatchError, match="PEFT does not take this adapter"):
        ns.export_lora(patch, tmp_path / "adapter", base=base, prefix="other.")
    assert snapshot(tmp_path) == before
    ns.export_lora(patch, tmp_path / "adapter", base=base, prefix="")


def test_without_the_extra_names_are_those_of_the_files_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = saved(llama, tmp_path)
    patch = cut((base, tuned), tmp_path / "p")
    ns.export_lora(patch, tmp_path / "with", base=base)
    assert not caplog.records
    monkeypatch.delitem(sys.modules, "neftsurgery.live.lora_places")
    monkeypatch.setitem(sys.modules, "peft", None)
    with caplog.at_level(logging.WARNING):
        ns.export_lora(patch, tmp_path / "without", base=base)
    assert "peft cannot be imported; in a clone of neftsurgery: pip install '.[train]'" in caplog.text
    contents = [snapshot(tmp_path / name) for name in ("with", "without")]
    assert contents[0] == contents[1]


def test_the_command_says_what_only_peft_reads(tmp_path: Path, neft: Any) -> None:
    base, tuned = saved(vit, tmp_path)
    cut((base, tuned), tmp_path / "p", exclude=["*embeddings"])
    usual = ("export", "p", "--to", "lora", "--base", "base")
    done: Result = neft(*usual, "-o", "a", "--rank-pattern", "--dtype", "bf16", "--json")
    assert done.code == 0
    assert any("readers other than PEFT" in warning for warning in done.json["warnings"])
    assert done.json["dtype"] == "BF16"
    assert done.json["bytes"] == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    said = neft(*usual, "-o", "b", "--rank-pattern", "--dry-run")
    assert "at ranks " in said.out
    assert neft(*usual, "-o", "b", "--rank", "0").code == 2


def test_a_config_that_does_not_describe_the_weights_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = saved(llama, tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"intermediate_size": 32}
    (base / "config.json").write_text(json.dumps(config))
    ns.export_lora(cut((base, tuned), tmp_path / "p"), tmp_path / "adapter", base=base)
    assert "named as in the files" in caplog.text
    assert "config.json describes another model" in caplog.text
