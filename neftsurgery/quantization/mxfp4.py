"""MXFP4, as gpt-oss stores its experts: E2M1 codes, two a byte, with an E8M0 scale per 32 of a row.

``NAME_blocks`` is ``[experts, out, in / 32, 16]`` and ``NAME_scales`` ``[experts, out, in / 32]``; the weight
that models have of them, ``NAME``, is ``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..tensors.header import TensorInfo
from .settings import Settings
from .weight import Companion, QuantizedWeight

_GROUP = 32


def mxfp4_weights(settings: Settings) -> Iterator[QuantizedWeight]:
    """The weights of a checkpoint whose config says MXFP4."""
    for info in settings.of_dtypes("U8"):
        name = info.name.removesuffix("_blocks")
        if name == info.name:
            continue
        scale = settings.required(info, [f"{name}_scales"])
        *outer, groups, width = info.shape if len(info.shape) == 4 else (*info.shape, 0)
        if 2 * width != _GROUP or scale.dtype != "U8" or scale.shape != info.shape[:-1]:
            raise settings.unlike(info, scale, f"U8 [..., n, {_GROUP // 2}] with scales U8 [..., n]")
        shape = (*outer, groups * _GROUP)
        weight = TensorInfo(settings.free(name, info), "F32", (outer[0], shape[-1], outer[1]))
        yield QuantizedWeight(
            "mxfp4", weight, info, shape, "E2M1", Companion.of(scale, shape, 1), _GROUP, transposed=True
        )
