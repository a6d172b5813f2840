"""Reads and checks how scores, selections, patches and journals describe a tensor with neurons."""

from __future__ import annotations

import math
from typing import TypeGuard

from ..tensors.document import bad
from ..tensors.dtypes import DTYPES
from ..tensors.header import TensorInfo
from ..tensors.reader import TensorFile
from .layout import Layout

__all__ = ["described_tensor"]

_MAX_AXES = 64
_MAX_ELEMENTS = 1 << 62


def described_tensor(file: TensorFile, what: str, name: str, entry: object) -> tuple[TensorInfo, Layout]:
    """A tensor's ``shape``, ``dtype`` and ``neuron_axes``, from its entry in ``tensors``.

    Raises a `CorruptFileError` if one is missing or makes no sense.
    """
    if not isinstance(entry, dict):
        raise bad(file, what, "its description is not an object", name)
    shape, dtype, axes = entry.get("shape"), entry.get("dtype"), entry.get("neuron_axes")
    if not _naturals(shape) or not _naturals(axes) or not _known(dtype):
        raise bad(file, what, "its shape, dtype or neuron_axes are missing or make no sense", name)
    if len(shape) > _MAX_AXES or len(axes) > len(shape) or math.prod(shape) >= _MAX_ELEMENTS:
        raise bad(file, what, "its shape has too many axes or elements", name)
    if DTYPES[dtype].bits % 8:
        raise bad(file, what, f"{dtype} elements do not fill whole bytes", name)
    try:
        return TensorInfo(name, dtype, tuple(shape)), Layout.of(shape, axes)
    except ValueError as error:
        raise bad(file, what, str(error), name) from error


def _known(dtype: object) -> TypeGuard[str]:
    return isinstance(dtype, str) and dtype in DTYPES


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
    )
