"""Which tensors of a checkpoint are codes whose value needs a scale stored elsewhere, and which are scales.

Formats write ``X.weight`` as codes beside ``X.weight_scale``, ``X.scales``, ``X.weight.absmax`` and the like.
Rows of either are not rows of weights, so they are never scored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..quantization.settings import quantization_section
from ..tensors.header import TensorInfo
from .submodels import part_config, split_part

# Names of scales after ``X.``, the most certain first.
_SCALES_OF_STEM = """weight_scale weight_scale_inv weight_scale_2 weight_scales weight_zero_point weight_shape
weight_g_idx weight_global_scale scales qzeros g_idx SCB biases codebooks scale zero input_scale
input_global_scale weight_format"""
# Names of scales after the whole name of the codes, "X.weight" or "experts.gate_up_proj".
_SCALES_OF_NAME = """.absmax .quant_map .nested_absmax .nested_quant_map ._scale ._shift _scale_inv _scale
_scales"""
# bitsandbytes packs its settings into a byte tensor "X.weight.quant_state.bitsandbytes__nf4".
_STATE = ".quant_state."
# What only scales are called: without codes, they mean nothing.
_ONLY_SCALES = (".weight_scale", "_scale_inv", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
# Names of the codes themselves after ``X.``; MXFP4 experts write "gate_up_proj_blocks".
_CODES = ("weight", "qweight", "weight_packed", "codes", "W_q")
_BLOCKS, _SCALES = "_blocks", "_scales"


def quantization_reasons(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None
) -> dict[str, str]:
    """Why each quantized tensor and each scale is left out, by name.

    By a ``quantization_config``, 8-bit floats and integers named like weights are codes even without a scale.
    """
    methods: dict[str, str | None] = {}

    def method_of(name: str) -> str | None:
        part, _ = split_part(name)
        if part not in methods:
            section = quantization_section(part_config(config, name))
            method = str((section or {}).get("quant_method", "a method it does not name"))[:40]
            methods[part] = method if section else None
        return methods[part]

    codes: dict[str, str] = {}
    orphans = (name for name in tensors if name.endswith(_ONLY_SCALES) and method_of(name) is not None)
    scales = dict.fromkeys(orphans, "quantized: scales without their codes")
    for name, info in tensors.items():
        kind = info.type.kind
        if kind not in ("integer", "packed") and not (kind == "float" and info.type.bits == 8):
            continue
        owner, state, _ = name.partition(_STATE)
        if state and owner in tensors:
            scales[name] = f"quantized: belongs to {owner}"
            continue
        head, dot, last = name.rpartition(".")
        stem = head + dot if last in _CODES else None  # ``X.`` of codes named ``X.weight``
        found = _scales_of(name, stem, tensors)
        if found:
            codes[name] = f"quantized: its values need {found[0]}"
            scales.update((scale, f"quantized: belongs to {name}") for scale in found)
        elif kind == "packed":
            codes[name] = f"quantized: {info.dtype} elements are codes"
        elif (kind == "float" or stem is not None) and (method := method_of(name)) is not None:
            codes[name] = f"quantized: by {split_part(name)[0]}config.json, with {method}"
    return codes | scales


def _scales_of(name: str, stem: str | None, tensors: Collection[str]) -> list[str]:
    candidates = [name + suffix for suffix in _SCALES_OF_NAME.split()]
    if stem is not None:
        candidates += [stem + scale for scale in _SCALES_OF_STEM.split()]
    if name.endswith(_BLOCKS):
        candidates.append(name.removesuffix(_BLOCKS) + _SCALES)
    return [scale for scale in candidates if scale != name and scale in tensors]
