"""Which weights of a checkpoint are quantized in a way that is known, told by its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .compressed_tensors import compressed_weights
from .fp8 import fp8_weights
from .mxfp4 import mxfp4_weights
from .settings import Settings
from .weight import QuantizedWeight

#: By ``quant_method``.
_LAYOUTS: dict[str, Callable[[Settings], Iterator[QuantizedWeight]]] = {
    "fp8": fp8_weights,
    "fbgemm_fp8": fp8_weights,
    "modelopt": fp8_weights,
    "mxfp4": mxfp4_weights,
    "compressed-tensors": compressed_weights,
}


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
