"""FP8 codes with a scale per block, row or tensor, as DeepSeek, FBGEMM and modelopt store them."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import MismatchError
from .settings import Settings, is_block
from .weight import QuantizedWeight

_NAMES = ("weight_scale_inv", "weight_scale")  # of scales, beside ``weight``; else ``NAME_scale_inv``


def fp8_weights(settings: Settings) -> Iterator[QuantizedWeight]:
    """The weights of a checkpoint whose config says FP8."""
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
        names = [f"{stem}{dot}{one}" for one in _NAMES] if last == "weight" else []
        scale = settings.required(info, [*names, f"{info.name}_scale_inv", f"{info.name}_scale"])
        yield settings.scaled("fp8", info, info.shape, info.dtype, scale, allowed)
