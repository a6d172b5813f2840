"""Quantized weights written by hand from the descriptions of their formats, with their numbers in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import raw_folder

Raw = Mapping[str, tuple[str, NDArray[Any]]]
Numbers = NDArray[np.float64]
LAYER = "model.layers.0.mlp."


@dataclass(frozen=True)
class Quantized:
    """One weight as a file stores it, and what it stands for: as models have it, and by rows of codes."""

    name: str
    tensors: Raw
    section: Mapping[str, Any]
    numbers: Numbers
    codes: str
    scales: str
    rows: tuple[int, ...] = (0,)  # the axes of `numbers` along which neurons lie
    model_type: str = "llama"
    share: int = 1  # neighbouring rows that share scales

    def write(self, folder: Path, shards: int = 2) -> Path:
        """A checkpoint of it; codes and scales lie in different shards."""
        config = {"model_type": self.model_type, "quantization_config": dict(self.section)}
        return raw_folder(folder, self.tensors, shards=min(shards, len(self.tensors)), config=config)

    def moved(self, seed: int = 2) -> Quantized:
        """Other codes in a third of the rows, and other scales in some; its numbers are not known."""
        rng, tensors = np.random.default_rng(seed), dict(self.tensors)
        for name, share in ((self.codes, 0.3), (self.scales, 0.4)):
            kind, bits = tensors[name]
            rows = bits.copy().reshape(-1, bits.shape[-1])
            chosen = np.flatnonzero(rng.random(len(rows)) < share)
            rows[chosen, rng.integers(0, rows.shape[1], len(chosen))] ^= 1
            tensors[name] = (kind, rows.reshape(bits.shape))
        return replace(self, tensors=tensors)

    def original(self, folder: Path, change: float, seed: int = 5) -> tuple[Path, Numbers]:
        """A checkpoint of plain numbers near these, in BF16; and its numbers."""
        moved = self.numbers * (1 + change * np.random.default_rng(seed).standard_normal(self.numbers.shape))
        bits = bf16(moved)
        config = {"model_type": self.model_type}
        return raw_folder(folder, {self.name: ("BF16", bits)}, config=config), from_bf16(bits)


def bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Numbers:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def e4m3(codes: NDArray[np.uint8]) -> Numbers:
    """The numbers of E4M3 codes: 1 sign, 4 exponent bits of bias 7, 3 fraction bits; 127 is NaN."""
    exponent, fraction = (codes >> 3).astype(int) & 15, (codes & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    size = np.where((codes & 127) == 127, np.nan, size)
    return np.where(codes > 127, -size, size)


def spread(scales: NDArray[Any], shape: tuple[int, ...], high: int, wide: int) -> Numbers:
    wide_scales = scales.astype(np.float64).repeat(high, -2).repeat(wide, -1)
    return wide_scales[..., : shape[-2], : shape[-1]]


def packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Codes from 0 along the last axis, the first in the lowest bits of words of 32 bits."""
    per_word = 32 // bits
    short = -codes.shape[-1] % per_word
    filled = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, short)]).astype(np.uint32)
    words = filled.reshape(*codes.shape[:-1], -1, per_word) << (bits * np.arange(per_word, dtype=np.uint32))
    return np.bitwise_or.reduce(words, axis=-1)


def fp8_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    codes = rng.integers(0, 126, shape).astype(np.uint8)
    return codes | (rng.integers(0, 2, shape) << 7).astype(np.uint8)


def scales_of(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return (1e-3 * (1 + rng.random(shape))).astype(np.float32)


def fp8(rng: np.random.Generator, grid: str, shape: tuple[int, ...] = (300, 200)) -> Quantized:
    experts = len(shape) > 2
    name = f"{LAYER}experts.gate_up_proj" if experts else f"{LAYER}up_proj.weight"
    codes = fp8_codes(rng, shape)
    high, wide = {"block": (128, 128), "channel": (1, shape[-1]), "tensor": shape[-2:]}[grid]
    scales = scales_of(rng, (*shape[:-2], -(-shape[-2] // high), -(-shape[-1] // wide)))
    numbers = e4m3(codes) * spread(scales, shape, high, wide)
    suffix = "_scale_inv" if grid == "block" else "_scale"
    stored = scales.reshape(1) if grid == "tensor" else scales
    tensors = {name: ("F8_E4M3", codes), name + suffix: ("F32", stored.view(np.uint32))}
    section = {
        "block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "channel": {"quant_method": "fbgemm_fp8"},
        "tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    }[grid]
    rows, model_type = ((0, 1), "deepseek_v3") if experts else ((0,), "llama")
    return Quantized(name, tensors, section, numbers, name, name + suffix, rows, model_type, high)


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


def mxfp4(rng: np.random.Generator, experts: int = 3, out: int = 40, width: int = 96) -> Quantized:
    name = f"{LAYER}experts.gate_up_proj"
    blocks = rng.integers(0, 256, (experts, out, width // 32, 16)).astype(np.uint8)
    scales = rng.integers(110, 125, (experts, out, width // 32)).astype(np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    numbers = np.where(pairs > 7, -values[pairs & 7], values[pairs & 7])
    numbers = (numbers * 2.0 ** (scales.astype(int)[..., None] - 127)).reshape(experts, out, width)
    tensors = {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", scales)}
    places = (f"{name}_blocks", f"{name}_scales", (0, 2), "gpt_oss")
    return Quantized(name, tensors, {"quant_method": "mxfp4"}, numbers.transpose(0, 2, 1), *places)


def integers(
    rng: np.random.Generator,
    bits: int = 4,
    group: int | None = 32,
    *,
    zeros: str = "",
    order: bool = False,
    words: bool = True,
    shape: tuple[int, int] = (37, 96),
) -> Quantized:
    """Integers of compressed-tensors: packed in ``words`` or not; ``zeros``: ``packed``, ``plain`` or ""."""
    stem, (rows, columns), half = f"{LAYER}up_proj.weight", shape, 1 << (bits - 1)
    size = group or columns
    codes = rng.integers(-half, half, shape)
    scales = from_bf16(bf16(scales_of(rng, (rows, -(-columns // size)))))
    owner = rng.permutation(columns) // size if order else np.arange(columns) // size
    points = rng.integers(-half, half, scales.shape) if zeros else np.zeros(scales.shape, int)
    numbers = (codes - points[:, owner]) * scales[:, owner]
    tensors: dict[str, tuple[str, NDArray[Any]]] = {f"{stem}_scale": ("BF16", bf16(scales))}
    if words:
        tensors |= {
            f"{stem}_packed": ("I32", packed(codes + half, bits)),
            f"{stem}_shape": ("I64", np.array(shape, np.uint64)),
        }
    else:
        tensors[stem] = ("I8", codes.astype(np.int8).view(np.uint8))
    if zeros == "packed":
        tensors[f"{stem}_zero_point"] = ("I32", np.ascontiguousarray(packed(points.T + half, bits).T))
    elif zeros:
        tensors[f"{stem}_zero_point"] = ("I8", points.astype(np.int8).view(np.uint8))
    if order:
        tensors[f"{stem}_g_idx"] = ("I32", owner.astype(np.uint32))
    weights = {"num_bits": bits, "type": "int", "strategy": "group" if group else "channel"}
    section = compressed("pack-quantized" if words else "int-quantized", **weights, group_size=group)
    codes_name = f"{stem}_packed" if words else stem
    share = 32 // bits if zeros == "packed" else 1
    return Quantized(stem, tensors, section, numbers, codes_name, f"{stem}_scale", share=share)


#: One weight of each layout, and of each way that its parts may be stored.
LAYOUTS: dict[str, Callable[[np.random.Generator], Quantized]] = {
    "fp8 blocks": lambda rng: fp8(rng, "block"),
    "fp8 blocks of experts": lambda rng: fp8(rng, "block", (3, 150, 130)),
    "fp8 rows": lambda rng: fp8(rng, "channel"),
    "fp8 tensor": lambda rng: fp8(rng, "tensor"),
    "mxfp4": mxfp4,
    "int4 groups": integers,
    "int4 groups with packed zero points": lambda rng: integers(rng, zeros="packed"),
    "int4 groups with zero points": lambda rng: integers(rng, zeros="plain"),
    "int4 groups of sorted columns": lambda rng: integers(rng, order=True),
    "int4 rows that end within a word": lambda rng: integers(rng, group=None, shape=(20, 101)),
    "int8 groups": lambda rng: integers(rng, 8),
    "int8 rows, not packed, with zero points": lambda rng: integers(rng, 8, None, zeros="plain", words=False),
}
