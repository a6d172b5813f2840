"""A checkpoint that is in memory: names and tensors, of numpy or torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UsageError
from ..tensors.arrays import IndexArray, RawBytes
from ..tensors.header import TensorInfo

#: The names that torch gives the dtypes of which numpy has none, or another one.
_TORCH_NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    **{f"{sign}int{bits}": f"{sign.upper() or 'I'}{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


class TensorsInMemory:
    """A mapping of names to tensors, read like a checkpoint of one file. They must not change."""

    bytes_read = 0

    def __init__(self, tensors: Mapping[str, Any], name: str) -> None:
        self._values = tensors
        self.name = name
        self.tensors = {key: tensor_info(key, value) for key, value in tensors.items()}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""
        size = self.tensors[name].type.bits // 8
        first, last = start // size, -(-(start + len(buffer)) // size)
        raw = tensor_bytes(self._values[name], first, last)
        buffer[:] = raw[start - first * size :][: len(buffer)].data

    def read_rows(self, name: str, rows: IndexArray, out: RawBytes) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of tensor ``name``."""
        for row, part in zip(rows.tolist(), out, strict=True):
            self.read_into(name, row * out.shape[1], part.data)

    def window(self, name: str, start: int, room: RawBytes, mapped: bool) -> None:
        """None: what is in memory is read, not mapped."""

    def check_unchanged(self) -> None:
        """Nothing to check: what is in memory is what was read."""


def tensor_info(name: str, tensor: Any) -> TensorInfo:
    """The header entry of a tensor of numpy or torch."""
    dtype = getattr(tensor, "dtype", None)
    dtype = _TORCH_NAMES.get(getattr(dtype, "name", str(dtype)).removeprefix("torch."))  # numpy's have a name
    if dtype is None:
        raise UsageError("not a tensor of numpy or torch", tensor=str(name), found=type(tensor).__name__)
    return TensorInfo(str(name), dtype, tuple(int(size) for size in tensor.shape))


def tensor_bytes(tensor: Any, start: int = 0, stop: int | None = None) -> RawBytes:
    """Bytes of the elements ``[start, stop)`` of a tensor, row-major."""
    stop = math.prod(tensor.shape) if stop is None else stop
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        part = tensor.detach().contiguous().view(-1)[start:stop].cpu()
        found: RawBytes = part.view(torch.uint8).numpy()
        return found
    flat = np.ascontiguousarray(tensor).reshape(-1)[start:stop]
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8)
