"""Weights of a live model: their dtypes, the vectors of neurons in them, and these vectors' bytes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..neurons.layout import Layout
from ..tensors.arrays import Mask, RawBytes
from ..tensors.dtypes import DTYPES

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
FLOAT_DTYPES = frozenset(_NAMES)
"""The dtypes whose elements are plain numbers."""


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of the safetensors dtype ``name``; None for integers and codes of quantized weights."""
    return _DTYPES.get(name)


def is_plain(weight: Tensor) -> bool:
    """Whether ``weight`` holds plain numbers, all of them: neither quantized nor a shard."""
    return type(weight.data) is Tensor and weight.dtype in FLOAT_DTYPES


def full_tensor(tensor: Any) -> Tensor:
    """The full tensor that ``tensor`` is a shard of, else itself. Every process of a group must call this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[no-any-return]


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a part of a tensor that several processes hold."""
    return hasattr(tensor, "full_tensor")  # a DTensor; importing its class takes long


def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Copy the full ``values`` into ``tensor``; a shard takes its part of them."""
    with torch.no_grad():
        if is_shard(tensor):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(values)


def can_represent(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether ``wide`` represents every value of ``narrow`` exactly."""
    if wide == narrow:
        return True
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal


def read_vectors(weight: Tensor, layout: Layout, index: Tensor) -> Tensor:
    """A copy of the vectors of neurons ``index``, contiguous ``[k, width]``, in the weight's dtype."""
    if layout.contiguous:
        return weight.reshape(layout.count, layout.width).index_select(0, index)
    if len(layout.axes) == 1:
        picked = weight.index_select(layout.axes[0], index).movedim(layout.axes[0], 0)
        return picked.reshape(len(index), layout.width).contiguous()
    return _neuron_axes_first(weight, layout)[_coordinates(layout, index)].reshape(len(index), layout.width)


def write_vectors(weight: Tensor, layout: Layout, index: Tensor, vectors: Tensor) -> None:
    """Write ``vectors``, ``[k, width]`` of any float dtype, into ``weight``: `read_vectors` inverted."""
    cast = vectors.to(weight.dtype)
    if layout.contiguous and weight.is_contiguous():
        whole, rows = _in_large_elements(weight.view(layout.count, layout.width), cast.contiguous())
        whole.index_copy_(0, index, rows)
        return
    if len(layout.axes) == 1:
        # Along axis 0 of a view: index_copy_ along another axis takes thirty times as long.
        view = weight.movedim(layout.axes[0], 0)
        view.index_copy_(0, index, cast.view(len(index), *view.shape[1:]))
        return
    view = _neuron_axes_first(weight, layout)
    view[_coordinates(layout, index)] = cast.view(len(index), *view.shape[len(layout.axes) :])


def _in_large_elements(*tensors: Tensor) -> Sequence[Tensor]:
    """Contiguous ``tensors``, ``[.., width]``, as elements of 16 or 8 bytes where that can be.

    Copying by index takes time for each element: a fourth for bfloat16 as complex numbers.
    """
    if not all(type(one.data) is Tensor and one.device.type in ("cpu", "cuda") for one in tensors):
        return tensors
    begins = [n for tensor in tensors for n in (tensor.data_ptr(), tensor.storage_offset() * tensor.itemsize)]
    size = math.gcd(16, tensors[0].shape[-1] * tensors[0].itemsize, *begins)
    dtype = {16: torch.complex128, 8: torch.int64}.get(size)
    return tensors if dtype is None else [tensor.view(dtype) for tensor in tensors]


def _neuron_axes_first(weight: Tensor, layout: Layout) -> Tensor:
    return weight.permute(*layout.axes, *(n for n in range(weight.dim()) if n not in layout.axes))


def _coordinates(layout: Layout, index: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.unravel_index(index, [layout.shape[axis] for axis in layout.axes]))


def to_bytes(vectors: Tensor, dtype: str) -> RawBytes:
    """The bytes of ``vectors``, rounded to the safetensors dtype ``dtype``: ``[k, width * itemsize]``."""
    cast = vectors.detach().to(device="cpu", dtype=_DTYPES[dtype]).contiguous()
    size = DTYPES[dtype].itemsize
    return cast.view(torch.uint8).numpy().reshape(cast.shape[0], -1 if cast.numel() else cast.shape[1] * size)


def from_bytes(raw: RawBytes, dtype: str) -> Tensor:
    """The inverse of `to_bytes`: ``[k, width]``, on the CPU."""
    return torch.from_numpy(np.array(raw, order="C", copy=True)).view(_DTYPES[dtype])


def equal_vectors(a: Tensor, b: Tensor) -> Mask:
    """Which vectors of ``a`` and ``b``, ``[k, width]`` of one dtype, are equal to the bit: ``[k]``."""
    equal: Mask = (to_bytes(a, _NAMES[a.dtype]) == to_bytes(b, _NAMES[a.dtype])).all(axis=1)
    return equal
