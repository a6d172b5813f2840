"""Quantized checkpoints of the real savers, read by the real loaders; needs a CPU only.

compressed-tensors is not installed with this project: `pip install compressed-tensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from quantized_support import fp8, mxfp4
from safetensors.torch import load_file, save_file

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.dequantized import dequantized

HIDDEN, FFN = 64, 96
COMMON = {"vocab_size": 32, "hidden_size": HIDDEN, "num_hidden_layers": 1, "dtype": "bfloat16"}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def numbers(folder: Path) -> dict[str, NDArray[Any]]:
    """Every quantized weight, in float64."""
    side = dequantized(Checkpoint.open(folder))
    found = {}
    for name in side.quantized:
        info = side.tensors[name]
        raw = np.empty(info.nbytes, np.uint8)
        side.read_into(name, 0, raw.data)
        found[name] = raw.view(info.type.numpy).reshape(info.shape).astype(np.float64)
    return found


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(8)[None]).logits
    return found


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    ).state_dict()
    return state


def assert_loaded(found: dict[str, NDArray[Any]], state: dict[str, torch.Tensor]) -> None:
    """The loader's weights are these numbers, rounded to bfloat16 once."""
    assert found
    for name, values in found.items():
        assert torch.equal(torch.from_numpy(values).to(torch.bfloat16), state[name].cpu()), name


SCHEMES = {
    "int4 groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 groups, asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 rows, asymmetric": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    format, weights = SCHEMES[scheme]
    args = QuantizationArgs(**weights)
    parts = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    config = QuantizationConfig(config_groups={"group_0": parts}, format=format).to_dict()
    folders, expected = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        weight = torch.randn(FFN, HIDDEN)
        blocks = weight.reshape(FFN, -1, 32) if weights["strategy"] == "group" else weight[:, None]
        low, high = blocks.amin(-1), blocks.amax(-1)
        if weights["strategy"] == "tensor":
            low, high = weight.min()[None], weight.max()[None]
        if weights["strategy"] == "block":
            blocks = weight.reshape(FFN // 16, 16, HIDDEN // 32, 32)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale, zero = calculate_qparams(low, high, args)
        scale = scale.to(torch.bfloat16)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress(state, parts)
        prefix = "model.layers.0.mlp.up_proj."
        folder = tmp_path / str(seed)
        folder.mkdir()
        save_file(
            {prefix + key: one.contiguous() for key, one in stored.items()}, folder / "model.safetensors"
        )
        text = json.dumps({"model_type": "llama", "quantization_config": config}, default=str)
        (folder / "config.json").write_text(text)
        folders.append(folder)
        wide = {key: one.double() if one.dtype == torch.bfloat16 else one for key, one in stored.items()}
        expected.append(compressor.decompress(wide, parts)["weight"].double().numpy())
        (found,) = numbers(folder).values()
        assert np.array_equal(found, expected[-1])
    patch = ns.extract(*folders, changed=True)
    ns.apply(folders[0], patch, out=tmp_path / "out")
    ours, theirs = (load_file(one / "model.safetensors") for one in (tmp_path / "out", folders[1]))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def plain_model(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    state: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return state


def write(folder: Path, like: Path, state: dict[str, torch.Tensor], section: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return folder


def patched_as_tuned(base: Path, tuned: Path, out: Path) -> None:
    """What changed, put on the base, computes what the tuned model does."""
    before, after = logits(base), logits(tuned)
    assert not torch.equal(before, after)
    ns.apply(base, ns.extract(base, tuned, changed=True), out=out)
    assert torch.equal(logits(out), after)
    some = ns.extract(base, tuned, neurons="10%", score="relative")
    ns.apply(base, some, out=out, force=True)
    assert not torch.equal(logits(out), before)
    ns.revert(out, some, base=base, in_place=True)
    assert torch.equal(logits(out), before)


def test_deepseek_fp8_blocks(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **COMMON, **HEADS, intermediate_size=FFN, moe_intermediate_size=FFN, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
    )  # fmt: skip
    state = plain_model(tmp_path / "plain", config)
    block = [32, 32]
    folders = []
    for seed in (0, 1):
        rng, stored = np.random.default_rng(seed), dict(state)
        for name, tensor in state.items():
            if "mlp.experts" in name or "shared_experts" in name:
                rows, columns = tensor.shape
                codes = torch.from_numpy(rng.integers(0, 126, (rows, columns), np.uint8))
                stored[name] = codes.view(torch.float8_e4m3fn)
                scales = 1e-3 * rng.random((-(-rows // 32), -(-columns // 32)), np.float32)
                stored[f"{name}_scale_inv"] = torch.from_numpy(scales)
        section = {"quant_method": "fp8", "weight_block_size": block, "modules_to_not_convert": [
            "lm_head", "self_attn", "mlp.gate",
        ]}  # fmt: skip
        folders.append(write(tmp_path / str(seed), tmp_path / "plain", stored, section))
    found = numbers(folders[0])
    assert len(found) == 4 * 3 + 3
    merged = loaded(folders[0])
    gate_up = torch.stack(
        [
            torch.cat(
                [
                    torch.from_numpy(found[f"model.layers.0.mlp.experts.{n}.{which}_proj.weight"])
                    for which in ("gate", "up")
                ]
            )
            for n in range(4)
        ]
    )
    assert torch.equal(gate_up.to(torch.bfloat16), merged["model.layers.0.mlp.experts.gate_up_proj"])
    patched_as_tuned(*folders, tmp_path / "out")


def test_gpt_oss_mxfp4(tmp_path: Path) -> None:
    from transformers import GptOssConfig

    config = GptOssConfig(
        **COMMON, **HEADS, intermediate_size=FFN, head_dim=32, num_local_experts=3, num_experts_per_tok=2,
        layer_types=["full_attention"],
    )  # fmt: skip
    state = plain_model(tmp_path / "plain", config)
    folders = []
    for seed in (0, 1):
        rng, stored = np.random.default_rng(seed), dict(state)
        for kind, out, width in (("gate_up", 2 * FFN, HIDDEN), ("down", HIDDEN, FFN)):
            name = f"model.layers.0.mlp.experts.{kind}_proj"
            assert stored.pop(name).shape == (3, width, out)
            weight = mxfp4(rng, 3, out, width)
            for suffix in ("blocks", "scales"):
                bits = weight.tensors[getattr(weight, "codes" if suffix == "blocks" else suffix)][1]
                stored[f"{name}_{suffix}"] = torch.from_numpy(bits)
        section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
        folders.append(write(tmp_path / str(seed), tmp_path / "plain", stored, section))
    assert_loaded(numbers(folders[0]), loaded(folders[0]))
    patched_as_tuned(*folders, tmp_path / "out")


def test_the_dequantizer_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = fp8(np.random.default_rng(0), "block", (256, 384))
    (found,) = numbers(weight.write(tmp_path / "a")).values()
    codes, scales = (torch.from_numpy(weight.tensors[one][1]) for one in (weight.codes, weight.scales))
    theirs = Fp8Dequantize(None)._dequantize_one(
        codes.view(torch.float8_e4m3fn), scales.view(torch.float32), torch.float32
    )
    assert torch.equal(theirs, torch.from_numpy(found).float())
