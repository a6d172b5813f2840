"""What planning and loading (utilization.py and loading.py) refuse, each with its class of error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_support import tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import neftsurgery as ns
from neftsurgery.neuron_utilization import measure

WORDS = len(tokenizer())


def save_llama(folder: Path, **more: Any) -> Path:
    """A tiny Llama in ``folder``, with a tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes | more)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    save_llama(folder / "base")
    save_llama(folder / "tuned", initializer_range=0.4)
    save_llama(folder / "wider", hidden_size=32)
    ns.extract(folder / "base", folder / "tuned", anatomy="ffn", neurons=9, out=folder / "patch.safetensors")
    (folder / "text.txt").write_text("a cat\n")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def spoil_config(place: Path, **keys: Any) -> None:
    path = place / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def no_tokenizer(place: Path) -> None:
    for file in (place / "base").glob("*token*"):
        file.unlink()


def t5(place: Path) -> None:
    spoil_config(place, model_type="t5", architectures=["T5ForConditionalGeneration"])


def more_words(place: Path) -> None:
    path = place / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["c"] = WORDS + 5
    path.write_text(json.dumps(content))


CASES: list[tuple[str, Callable[[Path], Any], dict[str, Any], type[ns.NeftError], str]] = [
    ("no tokenizer", no_tokenizer, {}, ns.UsageError, "no tokenizer that transformers can load"),
    ("no text", lambda p: (p / "text.txt").unlink(), {}, ns.UsageError, "no such text file"),
    ("blank text", lambda p: (p / "text.txt").write_text(" \n\n"), {}, ns.UsageError, "there is no text"),
    ("not UTF-8", lambda p: (p / "text.txt").write_bytes(b"\xff\xfe"), {}, ns.CorruptFileError, "not UTF-8"),
    ("no config", lambda p: (p / "base/config.json").unlink(), {}, ns.UsageError, "with a config.json"),
    ("strange config", lambda p: spoil_config(p, model_type="never heard of"), {}, ns.UsageError,
     "transformers cannot load the model"),
    ("encoder and decoder", t5, {}, ns.UsageError, "two streams of hidden states"),
    ("tokenizer of another model", more_words, {}, ns.MismatchError, "a token that the model does not have"),
    ("anatomy", None, {"anatomy": "units"}, ns.UsageError, "only single vectors can be correlated"),
    ("states", None, {"states": "some"}, ns.UsageError, "no such states"),
    ("dtype", None, {"dtype": "int3"}, ns.UsageError, "no such dtype"),
    ("device", None, {"device": "abacus"}, ns.UsageError, "no device 'abacus'"),
    ("tokens", None, {"tokens": 0}, ns.UsageError, "tokens must be at least 1"),
    ("batch", None, {"batch": 0}, ns.UsageError, "batch must be at least 1"),
    ("strongly", None, {"strongly": "0.3"}, ns.UsageError, "neither a percentage nor a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "options", "kind", "text"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input(
    place: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, options: Any, kind: Any, text: str
) -> None:
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    if spoil is not None:
        spoil(place)
    with pytest.raises(kind, match=text) as caught:
        ns.utilization(place / "base", place / "patch.safetensors", place / "text.txt", **options)
    assert type(caught.value) is kind


PAIRS: list[tuple[str, str, str, str]] = [
    ("patch of another base", "tuned", "patch.safetensors", "is not of this base"),
    ("patch of another model", "wider", "patch.safetensors", "not for this checkpoint"),
    ("a checkpoint of another hidden size", "base", "wider", "no tensor in common"),
]


@pytest.mark.parametrize(
    ("base", "tuned", "text"), [pair[1:] for pair in PAIRS], ids=[pair[0] for pair in PAIRS]
)
def test_inputs_that_do_not_fit(
    made: Path, monkeypatch: pytest.MonkeyPatch, base: str, tuned: str, text: str
) -> None:
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ns.MismatchError, match=text):
        ns.utilization(made / base, made / tuned, made / "text.txt")


def test_a_base_that_is_patched_already(place: Path) -> None:
    ns.apply(place / "base", place / "patch.safetensors", in_place=True)
    with pytest.raises(ns.MismatchError, match="found patched"):
        ns.utilization(place / "base", place / "patch.safetensors", place / "text.txt")


def test_a_single_file_is_not_a_model_folder(made: Path) -> None:
    with pytest.raises(ns.UsageError, match="a model folder with a config"):
        ns.utilization(made / "base" / "model.safetensors", made / "patch.safetensors", made / "text.txt")


def test_weights_that_are_missing_from_the_files(place: Path) -> None:
    weights = load_file(place / "base" / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, place / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ns.MismatchError, match="not in its files") as caught:
        ns.utilization(place / "base", place / "patch.safetensors", place / "text.txt")
    assert caught.value.tensor == "model.layers.1.self_attn.q_proj.weight"


def test_constant_vectors_rank_last(place: Path) -> None:
    for folder in ("base", "tuned"):
        weights = load_file(place / folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][:, 3] = 0.1
        weights["model.layers.1.mlp.up_proj.weight"][5] = 0
        save_file(weights, place / folder / "model.safetensors", {"format": "pt"})
    found = ns.utilization(place / "base", place / "tuned", place / "text.txt")
    assert found.tensors["model.layers.1.mlp.up_proj.weight"].rank_before[5] == 48
    assert found.tensors["model.layers.1.mlp.down_proj.weight"].rank_after[3] == 48
    assert not found.tensors["model.layers.1.mlp.up_proj.weight"].trained[5]
