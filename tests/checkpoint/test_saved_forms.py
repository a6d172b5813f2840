"""Forms of a model that do not compare with it, made by what makes them; each is called what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import LLAMA_CONFIG, llama, raw_file, write_file, write_folder

import neftsurgery as ns

BASE = llama(32, 48, 2, 64, seed=0)
TUNED = {name: array + np.float32(0.01) for name, array in BASE.items()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "base", BASE, 2, LLAMA_CONFIG)
    return tmp_path


def refused(*sides: str, error: type[ns.NeftError] = ns.MismatchError, **options: object) -> str:
    with pytest.raises(error) as caught:
        ns.diff(*sides, **options)
    assert str(caught.value).count("\n") == 1
    return str(caught.value)


@pytest.mark.parametrize("threshold", [0, 100, 1000])
def test_a_model_that_zero3_left_empty(here: Path, threshold: int, caplog: pytest.LogCaptureFixture) -> None:
    """ZeRO-3 keeps small parameters whole (``stage3_param_persistence_threshold``) and empties the others."""
    empty = {n: a if a.size < threshold else a[:0].reshape(0) for n, a in TUNED.items()}
    write_folder(here / "zero", empty, 1, LLAMA_CONFIG)
    count = sum(a.size == 0 for a in empty.values())
    for sides in (("base", "zero"), ("zero", "base")):
        if threshold < 1000:
            message = refused(*sides)
        else:  # weights of 512 elements are whole, and are compared
            caplog.clear()
            assert set(ns.diff(*sides).tensors) == {n for n, a in TUNED.items() if a.size == 512}
            message = caplog.text
        assert f"zero has {count} tensors without elements, as DeepSpeed ZeRO-3" in message
        assert "zero_to_fp32" in message
    if 2 * count > len(TUNED):
        assert f"{count} tensors have no elements, as DeepSpeed" in ns.inspect("zero")["warnings"][0]
    patch = ns.extract("base", write_folder(here / "tuned", TUNED), neurons=3)
    for verb in (lambda: ns.apply("zero", patch, out="new"), lambda: ns.verify("zero", patch)):
        with pytest.raises(ns.MismatchError, match="tensors without elements, as DeepSpeed ZeRO-3"):
            verb()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_part_of_one_rank_of_a_tensor_parallel_model(here: Path, ranks: int) -> None:
    """As Megatron divides: columns of o and down, rows of the others. torch says where a part ends."""
    part = {}
    for name, array in TUNED.items():
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        part[name] = array if "norm" in name else torch.from_numpy(array).chunk(ranks, axis)[0].numpy()
    write_folder(here / "rank0", part, 1, LLAMA_CONFIG)
    message = refused("base", "rank0")
    divided = sum("norm" not in name for name in TUNED)
    assert f"rank0 has 1/{ranks} of {divided} tensors each, as one of {ranks} ranks has" in message
    assert f"1/{ranks}" in refused("rank0", "base")
    patch = ns.extract("base", write_folder(here / "tuned", TUNED), neurons=3)
    with pytest.raises(ns.MismatchError, match=f"as one of {ranks} ranks has"):
        ns.apply("rank0", patch, out="new")


def test_parts_of_uneven_size_are_those_of_a_rank_too(here: Path) -> None:
    rows = {f"layers.{n}.weight": np.ones((rows, 4), np.float32) for n, rows in enumerate((7, 9, 11))}
    write_file(here / "whole", rows)
    write_file(here / "part", {n: a[: math.ceil(len(a) / 2)] for n, a in rows.items()})
    assert "part has 1/2 of 3 tensors each" in refused("whole", "part")


def test_another_model_is_not_called_a_part(here: Path) -> None:
    write_folder(here / "wider", llama(40, 80, 2, 64, seed=0), 1, LLAMA_CONFIG)
    with pytest.raises(ns.MismatchError, match="same shape") as error:
        ns.diff("base", "wider")
    assert error.value.hint is None
    write_file(here / "a", {"layers.0.weight": np.ones((4, 4), np.float32)})
    write_file(here / "b", {"layers.0.weight": np.ones((4, 3), np.float32)})
    with pytest.raises(ns.MismatchError, match="same shape") as error:
        ns.diff("a", "b")
    assert error.value.hint is None


def gptq(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The names and dtypes in which GPTQ stores a weight ``[out, in]`` in 4 bits."""
    stem, (rows, columns) = name.removesuffix("weight"), array.shape
    return {
        f"{stem}qweight": np.zeros((columns // 8, rows), np.int32),
        f"{stem}qzeros": np.zeros((1, rows // 8), np.int32),
        f"{stem}scales": np.ones((1, rows), np.float16),
        f"{stem}g_idx": np.zeros(columns, np.int32),
    }


def bitsandbytes(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {
        name: np.zeros((array.size // 2, 1), np.uint8),
        f"{name}.absmax": np.ones(array.size // 64, np.float32),
        f"{name}.quant_map": np.ones(16, np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    }


def mlx(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """An eighth of the columns, as a rank would have, but of codes."""
    stem, (rows, columns) = name.removesuffix("weight"), array.shape
    half = np.ones((rows, 1), np.float16)
    return {name: np.zeros((rows, columns // 8), np.uint32), f"{stem}scales": half, f"{stem}biases": half}


@pytest.mark.parametrize("store", [gptq, bitsandbytes, mlx])
def test_a_quantized_model_beside_its_original(here: Path, store) -> None:
    codes: dict[str, np.ndarray] = {}
    for name, array in TUNED.items():
        codes |= store(name, array) if "proj" in name else {name: array}
    write_folder(here / "quantized", codes, 1, LLAMA_CONFIG)
    for sides in (("base", "quantized"), ("quantized", "base")):
        message = refused(*sides)
        assert "quantized is quantized: compare unquantized checkpoints" in message


def test_an_fp8_model_beside_its_original(here: Path) -> None:
    entries = []
    for name, array in TUNED.items():
        if "proj" in name:
            entries.append((name, "F8_E4M3", list(array.shape), bytes(array.size)))
            entries.append((f"{name}_scale_inv", "F32", [1, 1], bytes(4)))
        else:
            entries.append((name, "F32", list(array.shape), array.tobytes()))
    raw_file(here / "fp8.safetensors", entries)
    assert "fp8.safetensors is quantized" in refused("base", "fp8.safetensors")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_model_saved_with_its_adapter_inside_and_the_file_of_an_adapter(here: Path) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    lora = peft.LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), lora)
    save_file(model.base_model.model.state_dict(), here / "whole.safetensors")
    assert "whole.safetensors holds the factors of a LoRA adapter" in refused("base", "whole.safetensors")
    model.save_pretrained(here / "adapter")
    message = refused("base", "adapter/adapter_model.safetensors")
    assert "merge_and_unload" in message
    assert "name the adapter's folder" in message
    assert ns.diff("base", "adapter").neurons  # as the message says


def test_the_names_of_checkpointing_wrappers_and_of_an_optimizer(here: Path) -> None:
    inner = {n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): a for n, a in TUNED.items()}
    inner = {n.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): a for n, a in inner.items()}
    write_folder(here / "wrapped", {n: a for n, a in inner.items() if ".layers." in n}, 1, LLAMA_CONFIG)
    message = refused("base", "wrapped")
    assert "wrapped was saved with a wrapper ('_checkpoint_wrapped_module' in its names)" in message
    state = {
        f"state.{n}.{which}": np.ones(4, np.float32) for n in range(3) for which in ("exp_avg", "exp_avg_sq")
    }
    write_file(here / "optimizer.safetensors", state)
    assert "optimizer.safetensors holds the state of an optimizer" in refused("base", "optimizer.safetensors")


# Patterns that match only what cannot be compared.


@pytest.mark.parametrize("option", ["include", "only", "axis"])
def test_a_pattern_that_matches_only_tensors_of_unequal_shape(here: Path, option: str) -> None:
    """Tokens were added: the embedding and the head have more rows."""
    grown = {
        n: np.concatenate([a, a[:2]]) if "norm" not in n and "layers" not in n else a
        for n, a in TUNED.items()
    }
    write_folder(here / "grown", grown, 1, LLAMA_CONFIG)
    given = {"*embed*": 0} if option == "axis" else ["*embed*"]
    message = refused("base", "grown", **{option: given})
    assert f"{option} '*embed*' matches only tensors of unequal shape or dtype" in message
    assert "tensor model.embed_tokens.weight" in message
    assert "expected F32 [64, 32], found F32 [66, 32]" in message
    with pytest.raises(ns.MismatchError, match="unequal shape"):
        ns.extract("base", "grown", changed=True, **{option: given})
    both = {"*embed*": 0, "*norm*": 0} if option == "axis" else ["*embed*", "*proj*"]
    if option != "axis":
        refused("base", "grown", **{option: both})
        found = ns.diff(
            "base", "grown", **{option: ["*e*"]}
        )  # matches others too: those are named, not refused
        assert set(found.facts["differing"]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_pattern_that_matches_only_tensors_of_one_side(here: Path) -> None:
    write_folder(here / "more", TUNED | {"model.extra.weight": np.ones((4, 4), np.float32)}, 1, LLAMA_CONFIG)
    with pytest.raises(ns.MismatchError, match="matches only tensors that more alone has") as error:
        ns.diff("base", "more", include=["*extra*"])
    assert error.value.tensor == "model.extra.weight"
    with pytest.raises(ns.MismatchError, match="matches only tensors that more alone has"):
        ns.diff("more", "base", include=["*extra*"])
    with pytest.raises(ns.UsageError, match="no tensor matches include 'nothing'"):
        ns.diff("base", "more", include=["nothing"])


def test_forms_are_told_where_a_patch_does_not_fit(here: Path) -> None:
    """The file of an adapter, and a quantized model, given as what is patched or verified."""
    patch = ns.extract("base", write_folder(here / "tuned", TUNED), neurons=3)
    name, *_ = patch.tensors
    factors = {f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": BASE[name] for x in "AB"}
    write_file(here / "adapter.safetensors", factors)
    codes = {one: array.astype(np.int8) if array.ndim == 2 else array for one, array in BASE.items()}
    scales = {f"{one}_scale": np.ones(len(array), np.float32) for one, array in BASE.items()}
    write_folder(here / "quantized", codes | scales, 1, LLAMA_CONFIG)
    for side, what in (("adapter.safetensors", "factors of a LoRA adapter"), ("quantized", "is quantized")):
        for options in ({"out": "new"}, None):
            with pytest.raises(ns.MismatchError, match=what):
                ns.verify(side, patch) if options is None else ns.apply(side, patch, **options)


def test_nothing_is_called_identical_where_no_neuron_was_scored(here: Path, neft: Any) -> None:
    """Only norms have equal shapes in one rank's part, and they are not neurons."""
    write_folder(
        here / "part", {n: a if "norm" in n else a[: len(a) // 2] for n, a in TUNED.items()}, 1, LLAMA_CONFIG
    )
    done = neft("diff", "base", "part", "--include", "*")
    assert (done.code, "No neuron was scored." in done.out, "dentical" in done.out) == (0, True, False)
    assert "scored neurons nothing" not in done.out
