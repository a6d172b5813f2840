"""Forms of a saved model that do not compare with it: wrapped, with adapters, quantized, one rank's part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ..neurons.quantized import quantization_reasons
from ..tensors.header import TensorInfo
from .checkpoint import Checkpoint
from .name_prefixes import fitting_prefixes

_WRAPPERS = re.compile(r"(?:^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)(?=\.)")
_UNWRAP = "save the model inside: `accelerator.unwrap_model(model).save_pretrained(OUT)`"
_MERGE = "merge it (`model.merge_and_unload().save_pretrained(OUT)`), or name the adapter's folder"
_DEQUANTIZE = "compare unquantized checkpoints, as `model.dequantize()` of transformers makes them"
_PATCH_BEFORE = "patch the checkpoint that it was made from, and quantize the result again"
_GATHER = (
    "have the trainer gather the weights (`stage3_gather_16bit_weights_on_model_save`), or join those of the "
    "training checkpoint: `python -m deepspeed.utils.zero_to_fp32 CHECKPOINT OUT --safe_serialization`"
)


def why_unlike(one: Checkpoint, other: Checkpoint) -> str | None:
    """Why two checkpoints that should be of one model have so little in common, and what helps."""
    for side, model in ((other, one), (one, other)):
        if why := _form(side, model.tensors, model.config):
            return f"{side.name} {why}"
    return None


def _form(
    side: Checkpoint, tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None = None
) -> str | None:
    """The form of ``side``, if a model with these ``tensors`` does not have it."""
    new = side.tensors.keys() - tensors.keys()
    if any(".lora_A." in name for name in new):
        return f"holds the factors of a LoRA adapter: {_MERGE}"
    if any(name.endswith((".exp_avg", ".exp_avg_sq")) for name in new):
        return "holds the state of an optimizer: name the weights"
    if wrapper := next((found[1] for name in new if (found := _WRAPPERS.search(name))), None):
        return f"was saved with a wrapper ({wrapper!r} in its names): {_UNWRAP}"
    if quantization_reasons(side.tensors, side.config) and not quantization_reasons(tensors, config):
        return f"is quantized: {_DEQUANTIZE}"
    return _shapes(tensors, side.tensors)


def why_unfit(needed: Mapping[str, TensorInfo], side: Checkpoint) -> str | None:
    """Why a checkpoint lacks tensors that something was made for, and what helps."""
    if prefixes := fitting_prefixes(side.tensors, needed):
        return f"its names have another prefix: `neftsurgery extract` makes a patch for it, with {prefixes}"
    if quantization_reasons(needed, None):
        return "the patch holds codes of quantized weights: it is only for the checkpoint it was made from"
    if quantization_reasons(side.tensors, side.config):
        return f"{side.name} is quantized: {_PATCH_BEFORE}"
    form = _form(side, needed)
    return f"{side.name} {form}" if form else None


def _shapes(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> str | None:
    """What the shapes of tensors say that have another one than ``expected``, and what helps."""
    unequal = [
        (info.shape, found[name].shape)
        for name, info in expected.items()
        if name in found and found[name].shape != info.shape
    ]
    empty = sum(0 in other and 0 not in shape for shape, other in unequal)
    if empty:
        return f"has {empty} tensors without elements, as DeepSpeed ZeRO-3 and FSDP leave them: {_GATHER}"
    ranks = Counter(count for shape, other in unequal if (count := _ranks(shape, other)))
    (count, times), *_ = ranks.most_common(1) or [(0, 0)]
    if times > 2 and 2 * times > len(unequal):
        return f"has 1/{count} of {times} tensors each, as one of {count} ranks has: join the ranks first"
    return None


def _ranks(whole: tuple[int, ...], part: tuple[int, ...]) -> int:
    """Among how many ranks one axis of ``whole`` was divided to give ``part``; 0 if it was not."""
    axes = [(a, b) for a, b in zip(whole, part, strict=False) if a != b]
    if len(whole) != len(part) or len(axes) != 1 or not 0 < axes[0][1] < axes[0][0]:
        return 0
    (size, share) = axes[0]
    count = round(size / share)
    return count if count > 1 and share in (size // count, -(-size // count)) else 0
