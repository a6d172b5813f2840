"""Vectors of chosen neurons in live tensors, and their bits in a checkpoint's element type. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..neurons.layout import Layout
from ..patch.patch import Raw
from ..tensors.dtypes import dtype_named

__all__ = [
    "FLOATS",
    "assign",
    "blocks_of",
    "from_bytes",
    "gather",
    "holds",
    "is_plain",
    "scatter",
    "to_bytes",
    "torch_dtype",
    "whole",
]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = frozenset(_DTYPES.values())
"""The types of plain numbers."""

_ELEMENTS = 1 << 24  # converted to bytes at once, at most


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch type of what safetensors calls ``name``; None for codes, which mean nothing on their own."""
    return _DTYPES.get(name)


def is_plain(weight: Tensor) -> bool:
    """Whether it holds numbers as they are: not quantized, and not a shard."""
    return type(weight.data) is Tensor and weight.dtype in FLOATS


def whole(tensor: Tensor) -> Tensor:
    """All of it, if it is a shard of a tensor: every process must ask at once."""
    shard: Any = tensor
    gathered: Tensor = shard.full_tensor() if _is_shard(tensor) else tensor
    return gathered


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; the module with its class takes long to import


def assign(tensor: Tensor, values: Tensor) -> None:
    """Copy ``values`` into it; into a shard its part of them."""
    with torch.no_grad():
        if _is_shard(tensor):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(values)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``."""
    if wide == narrow:
        return True
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal


def gather(weight: Tensor, layout: Layout, index: Tensor) -> Tensor:
    """A copy of the vectors of neurons ``index``, contiguous ``[k, width]``, in the weight's type.

    Parameters
    ----------
    weight:
        Of the layout's shape.
    index:
        int64 ``[k]``, on the weight's device.
    """
    if len(layout.axes) == 1:
        picked = weight.index_select(layout.axes[0], index).movedim(layout.axes[0], 0)
        return picked.reshape(len(index), layout.width).contiguous()
    return _grid(weight, layout)[_coordinates(layout, index)].reshape(len(index), layout.width)


def scatter(weight: Tensor, layout: Layout, index: Tensor, vectors: Tensor) -> None:
    """Write ``vectors`` (``[k, width]``, any float type) over those of neurons ``index``."""
    cast = vectors.to(weight.dtype)
    if len(layout.axes) == 1:
        # Along axis 0 of a view: index_copy_ along another axis takes thirty times as long.
        view = weight.movedim(layout.axes[0], 0)
        view.index_copy_(0, index, cast.view(len(index), *view.shape[1:]))
        return
    view = _grid(weight, layout)
    view[_coordinates(layout, index)] = cast.view(len(index), *view.shape[len(layout.axes) :])


def _grid(weight: Tensor, layout: Layout) -> Tensor:
    """A view with the neuron axes first."""
    return weight.permute(*layout.axes, *(n for n in range(weight.dim()) if n not in layout.axes))


def _coordinates(layout: Layout, index: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.unravel_index(index, [layout.shape[axis] for axis in layout.axes]))


def to_bytes(vectors: Tensor, dtype: str) -> Raw:
    """The bits of ``vectors`` rounded to the element type ``dtype``: uint8 ``[k, width * itemsize]``."""
    cast = vectors.detach().to(device="cpu", dtype=_DTYPES[dtype]).contiguous()
    size = dtype_named(dtype).itemsize
    return cast.view(torch.uint8).numpy().reshape(cast.shape[0], -1 if cast.numel() else cast.shape[1] * size)


def from_bytes(raw: Raw, dtype: str) -> Tensor:
    """The inverse of `to_bytes`: ``[k, width]`` on the CPU."""
    return torch.from_numpy(np.array(raw, order="C", copy=True)).view(_DTYPES[dtype])


def blocks_of(count: int, width: int) -> Sequence[tuple[int, int]]:
    """Ranges ``(start, stop)`` of ``count`` vectors that together bound the memory of conversions."""
    step = max(1, _ELEMENTS // max(1, width))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
