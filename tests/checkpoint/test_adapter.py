"""Scoring straight from a PEFT adapter: the oracle is PEFT's own merge, saved in float32 and diffed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_support import tiny
from safetensors.numpy import load_file, save_file
from support import Result, raw_folder, raw_read, snapshot, write_folder

import neftsurgery as ns

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TARGETS = {
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense"],
    "opt": ["fc1", "fc2", "k_proj"],
}


def trained(root: Path, name: str, **options: object) -> tuple[Path, Path, Path]:
    """Base, adapter and merged checkpoint: a few steps of PEFT's training."""
    from peft import LoraConfig, get_peft_model

    model = tiny(name)
    model.save_pretrained(root / "base")
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"}
    adapted = get_peft_model(model, LoraConfig(**(settings | options)))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(5):
        optimizer.zero_grad()
        adapted(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    adapted.save_pretrained(root / "adapter")
    adapted.merge_and_unload().save_pretrained(root / "merged")
    return root / "base", root / "adapter", root / "merged"


def assert_same_scores(found: ns.Scores, expected: ns.Scores) -> None:
    assert list(found.tensors) == list(expected.tensors)
    for name in expected.tensors:
        for which in ("base_sq", "delta_sq", "dot"):
            ours, theirs = found.sums(name, which), expected.sums(name, which)
            scale = (
                np.sqrt(expected.sums(name, "base_sq") * expected.sums(name, "delta_sq"))
                if which == "dot"
                else theirs
            )
            assert (np.abs(ours - theirs) <= 1e-4 * scale).all(), (name, which)
        np.testing.assert_allclose(found.values(name), expected.values(name), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("score", ["cosine", "relative"])
def test_diff_of_an_adapter_is_that_of_the_merged_model(tmp_path: Path, name: str, score: str) -> None:
    base, adapter, merged = trained(tmp_path, name)
    for anatomy in ("rows", "ffn", "units"):
        found = ns.diff(base, adapter, score=score, anatomy=anatomy)
        assert_same_scores(found, ns.diff(base, merged, score=score, anatomy=anatomy))
        assert found.select(neurons=5).neurons >= 5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3, r"layers.1.mlp.up_proj": 64}},
        {"alpha_pattern": {r".*\d+.*": 3}},
        {"target_modules": "all-linear"},
        {"r": 1},
    ],
    ids=["rslora", "patterns", "regex", "all", "one"],
)
def test_kinds_of_lora(tmp_path: Path, options: dict[str, object]) -> None:
    base, adapter, merged = trained(tmp_path, "llama", **options)
    assert_same_scores(ns.diff(base, adapter), ns.diff(base, merged))


def test_names_of_the_bare_model_and_of_the_one_with_a_head(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, "bert")
    expected = ns.diff(base, adapter)
    arrays = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    bare = {name.removeprefix("bert."): array for name, array in arrays.items()}
    found = ns.diff(write_folder(tmp_path / "bare", bare, 1, config), adapter, anatomy="ffn")
    assert max(found.sums(name, "delta_sq").max() for name in found.tensors) > 0

    weights = load_file(adapter / "adapter_model.safetensors")
    short = {
        name.replace("model.bert.", "model."): array for name, array in weights.items() if ".bert." in name
    }
    save_file(short, adapter / "adapter_model.safetensors")
    found = ns.diff(base, adapter)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    np.testing.assert_array_equal(found.values(name), expected.values(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [True, False], ids=["config", "no-config"])
def test_an_exported_adapter_is_read_as_its_patch(tmp_path: Path, name: str, config: bool) -> None:
    base, _, merged = trained(tmp_path, name)
    axis = {"*.c_*.weight": 1} if name == "gpt2" else {}
    if not config:
        (base / "config.json").unlink()
    patch = ns.extract(base, merged, neurons=20, axis=axis, out=tmp_path / "patch")
    ns.apply(base, patch, out=tmp_path / "patched")
    ns.export_lora(patch, tmp_path / "exported", base=base)
    found = ns.diff(base, tmp_path / "exported", axis=axis)
    assert_same_scores(found, ns.diff(base, tmp_path / "patched", axis=axis))


def test_a_base_in_bfloat16_is_compared_in_float32_and_keeps_its_dtype(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, "llama")
    wide = load_file(base / "model.safetensors")
    halves = {k: ("BF16", (v.view(np.uint32) >> 16).astype(np.uint16)) for k, v in wide.items()}
    config = json.loads((base / "config.json").read_text())
    short = raw_folder(tmp_path / "short", halves, 2, config)
    # What PEFT makes of it: the same base, widened, and merged in float32.
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(short, dtype=torch.float32)
    model.save_pretrained(tmp_path / "widened")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged32")
    found = ns.diff(short, adapter)
    assert_same_scores(found, ns.diff(tmp_path / "widened", tmp_path / "merged32"))
    assert {tensor.info.dtype for tensor in found.tensors.values()} == {"BF16"}
    # And a patch of it, which is rounded to bfloat16 once, as merging in place does.
    patch = ns.extract(short, adapter, scores=found, neurons=20, out=tmp_path / "p")
    assert patch.facts["captured"] > 0
    ns.apply(short, patch, out=tmp_path / "out")
    merged = load_file(tmp_path / "merged32" / "model.safetensors")
    for name in patch.tensors:
        expected = torch.from_numpy(merged[name]).to(torch.bfloat16).view(torch.int16).numpy().view("u2")
        index = patch.index(name)
        differing = raw_read(tmp_path / "out")[name][1][index] != expected[index]
        assert differing.mean() < 0.01  # two float32 products in another order, on the edge of a rounding


def test_nothing_depends_on_threads_and_the_command_line_takes_adapters(tmp_path: Path, neft: object) -> None:
    base, adapter, _ = trained(tmp_path, "gpt2")
    before = snapshot(adapter)
    for threads in (1, 4):
        ns.diff(base, adapter, threads=threads, out=tmp_path / f"s{threads}")
    assert (tmp_path / "s1").read_bytes() == (tmp_path / "s4").read_bytes()
    done: Result = neft("diff", base, adapter, "--json")  # type: ignore[operator]
    assert done.code == 0
    assert done.json["changed_neurons"] > 0
    done = neft("extract", base, adapter, "--neurons", "10", "-o", "p", "--json")  # type: ignore[operator]
    assert (done.code, done.json["selected"]) == (0, 10)
    assert snapshot(adapter) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
    ids=["dora", "saved", "bias", "embedding"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_other_kinds_are_refused_by_name(tmp_path: Path, options: dict[str, object], why: str) -> None:
    base, adapter, _ = trained(tmp_path, "opt" if "bias" in options else "llama", **options)
    with pytest.raises(ns.MismatchError, match=f"(?s){why}.*merge_and_unload"):
        ns.diff(base, adapter)


def test_broken_adapters(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, "llama")
    weights = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    first = min(weights)

    def variant(new_weights: dict[str, np.ndarray] = weights, **changes: object) -> Path:
        folder = tmp_path / "variant"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(new_weights, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    ns.diff(base, variant())
    half = {name: array for name, array in weights.items() if name != first}
    wrong = weights | {first: np.zeros((4, 3), np.float32)}
    foreign = {name.replace("layers.1", "layers.7"): array for name, array in weights.items()}
    for folder, kind, why in (
        (lambda: variant(half), ns.CorruptFileError, "missing"),
        (lambda: variant(wrong), ns.MismatchError, "do not fit"),
        (lambda: variant(foreign), ns.MismatchError, "no such weight"),
        (lambda: variant(peft_type="IA3"), ns.MismatchError, "IA3"),
        (lambda: variant(lora_alpha="much"), ns.CorruptFileError, "alpha"),
        (lambda: variant(lora_alpha=1e999), ns.CorruptFileError, "alpha|JSON"),
        (lambda: variant(lora_alpha=1e300), ns.CorruptFileError, "alpha"),
        (lambda: variant(lora_alpha=10**400), ns.CorruptFileError, "alpha"),
        (lambda: variant({}), ns.MismatchError, "no LoRA factor"),
    ):
        with pytest.raises(kind, match=why):
            ns.diff(base, folder())
    (variant() / "adapter_config.json").write_text("{")
    with pytest.raises(ns.CorruptFileError, match="JSON"):
        ns.diff(base, tmp_path / "variant")
    (variant() / "adapter_model.safetensors").unlink()
    with pytest.raises(ns.CorruptFileError, match="adapter_model"):
        ns.diff(base, tmp_path / "variant")
