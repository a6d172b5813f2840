"""Which weights of a checkpoint are quantized in a way that is known, told by its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import MismatchError
from ..tensors.header import TensorInfo
from .settings import ScaleBlock, Settings, is_block
from .weight import Companion, QuantizedWeight

_FP8_SCALES = ("weight_scale_inv", "weight_scale")  # beside ``weight``; else ``NAME_scale_inv``
_MXFP4_GROUP = 32
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
Schemes = Sequence[Mapping[str, Any]]


def quantized_weights(settings: Settings) -> dict[str, QuantizedWeight]:
    """By name, each weight whose codes and scales are understood; empty without a config that says so.

    Raises a `CorruptFileError` for codes whose scales are missing, and a `MismatchError` for those that do
    not fit their scales or the config.
    """
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in _LAYOUTS:
        return {}
    if method == "modelopt" and settings.get("quant_algo") != "FP8":
        return {}
    return {weight.info.name: weight for weight in _LAYOUTS[method](settings)}


def _fp8(settings: Settings) -> Iterator[QuantizedWeight]:
    """FP8 codes with a scale per block, row or tensor, as DeepSeek, FBGEMM and modelopt store them."""
    block = settings.get("weight_block_size")
    if block is not None and not is_block(block):
        raise MismatchError(
            "weight_block_size in config.json is not two sizes", file=settings.name, found=str(block)[:80]
        )
    allowed = [(block[0], block[1])] if block else [(1, 0), (0, 0)]
    if settings.get("quant_method") == "fbgemm_fp8":
        allowed.append((0, 1))  # of experts, which it stores as [experts, in, out]
    for info in settings.of_dtypes("F8_E4M3", "F8_E5M2"):
        stem, dot, last = info.name.rpartition(".")
        names = [f"{stem}{dot}{one}" for one in _FP8_SCALES] if last == "weight" else []
        scale = settings.required(info, [*names, f"{info.name}_scale_inv", f"{info.name}_scale"])
        yield settings.scaled("fp8", info, info.shape, info.dtype, scale, allowed)


def _mxfp4(settings: Settings) -> Iterator[QuantizedWeight]:
    """MXFP4, as gpt-oss stores its experts: E2M1 codes, two a byte, with an E8M0 scale per 32 of a row.

    ``NAME_blocks`` is ``[experts, out, in / 32, 16]`` and ``NAME_scales`` ``[experts, out, in / 32]``; the
    weight that models have of them, ``NAME``, is ``[experts, in, out]``.
    """
    for info in settings.of_dtypes("U8"):
        name = info.name.removesuffix("_blocks")
        if name == info.name:
            continue
        scale = settings.required(info, [f"{name}_scales"])
        *outer, groups, width = info.shape if len(info.shape) == 4 else (*info.shape, 0)
        if 2 * width != _MXFP4_GROUP or scale.dtype != "U8" or scale.shape != info.shape[:-1]:
            raise settings.unlike(info, scale, f"U8 [..., n, {_MXFP4_GROUP // 2}] with scales U8 [..., n]")
        shape = (*outer, groups * _MXFP4_GROUP)
        weight = TensorInfo(settings.free(name, info), "F32", (outer[0], shape[-1], outer[1]))
        yield QuantizedWeight(
            "mxfp4", weight, info, shape, "E2M1", Companion.of(scale, shape, 1), _MXFP4_GROUP, transposed=True
        )


def _compressed(settings: Settings) -> Iterator[QuantizedWeight]:
    """compressed-tensors: FP8 and integers with scales, and integers packed into 32-bit words."""
    if settings.get("format") not in _FORMATS:
        return
    groups = settings.get("config_groups")
    stated = [_weights(group) for group in (groups.values() if isinstance(groups, dict) else ())]
    floats, integers = ([one for one in stated if one.get("type") == kind] for kind in ("float", "int"))
    for info in settings.of_dtypes("F8_E4M3", "F8_E5M2", "I8", "I32"):
        packed = info.name.endswith(".weight_packed")
        schemes = floats if info.dtype.startswith("F8") else integers
        if not schemes or packed != (info.dtype == "I32"):
            continue
        if not packed and info.name.endswith(".weight"):
            yield _plain(settings, info, schemes)
        elif packed and {repr(one.get("num_bits")) for one in schemes} <= {"4", "8"}:
            yield _packed(settings, info, schemes)


def _weights(group: object) -> Mapping[str, Any]:
    found = group.get("weights") if isinstance(group, dict) else None
    return found if isinstance(found, dict) else {}


def _plain(settings: Settings, info: TensorInfo, schemes: Schemes) -> QuantizedWeight:
    """Codes that have the shape of the weight."""
    stem = info.name.removesuffix("weight")
    scale = settings.required(info, [f"{stem}weight_scale"])
    blocks = [_block(one) for one in schemes]
    layout = "int8" if info.dtype == "I8" else "fp8"
    weight = settings.scaled(layout, info, info.shape, info.dtype, scale, blocks)
    zeros = settings.tensors.get(f"{stem}weight_zero_point")
    if zeros is None or info.dtype != "I8":
        return weight
    return replace(weight, zeros=_like_scales(settings, info, zeros, weight.scales))


def _packed(settings: Settings, info: TensorInfo, schemes: Schemes) -> QuantizedWeight:
    """Codes packed along the rows; ``weight_shape`` says how many of the last word count."""
    stem = info.name.removesuffix("weight_packed")
    scale = settings.required(info, [f"{stem}weight_scale"])
    stated = settings.required(info, [f"{stem}weight_shape"])
    shape = settings.whole_numbers(stated)
    bits = sorted({one["num_bits"] for one in schemes})
    fits = [n for n in bits if shape[:-1] == info.shape[:-1] and -(-shape[-1] * n // 32) == info.shape[-1]]
    if not fits:
        raise settings.unlike(info, stated, f"that of codes of {' or '.join(map(str, bits))} bits")
    blocks = [_block(one) for one in schemes if one.get("num_bits") in fits]
    weight = settings.scaled("packed-int", info, shape, f"offset {fits[0]}", scale, blocks)
    weight = replace(weight, others=(Companion.shared(stated, shape),))
    if (order := settings.tensors.get(f"{stem}weight_g_idx")) is not None:
        if order.dtype not in ("I32", "I64") or order.shape != shape[-1:]:
            raise settings.unlike(info, order, f"I32 {[shape[-1]]}")
        weight = replace(weight, order=Companion.shared(order, shape))
    zeros = settings.tensors.get(f"{stem}weight_zero_point")
    if zeros is None:
        return weight
    if zeros.dtype != "I32":
        return replace(weight, zeros=_like_scales(settings, info, zeros, weight.scales))
    per_word = 32 // fits[0]
    *outer, rows, columns = weight.scales.info.shape
    expected = (*outer, -(-rows // per_word), columns)
    if weight.scales.span != 1 or zeros.shape != expected:
        raise settings.unlike(info, zeros, f"I32 {list(expected)}")
    return replace(weight, zeros=Companion.of(zeros, shape, per_word), packed_zeros=True)


def _like_scales(settings: Settings, info: TensorInfo, zeros: TensorInfo, scales: Companion) -> Companion:
    if zeros.dtype != "I8" or zeros.shape != scales.info.shape:
        raise settings.unlike(info, zeros, f"I8 {list(scales.info.shape)}, as its scales")
    return replace(scales, info=zeros)


def _block(scheme: Mapping[str, Any]) -> ScaleBlock:
    """How many rows and columns share a scale; 0: all."""
    strategy, size, block = (scheme.get(key) for key in ("strategy", "group_size", "block_structure"))
    if strategy == "block" and is_block(block):
        return block[0], block[1]
    if strategy == "group" and isinstance(size, int) and size > 0:
        return 1, size
    return (1, 0) if strategy == "channel" else (0, 0)


#: By ``quant_method``.
_LAYOUTS: dict[str, Callable[[Settings], Iterator[QuantizedWeight]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
