"""Names for the arrays that the package passes around."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

RawBytes: TypeAlias = NDArray[np.uint8]
"""Elements of any type as their bytes, little-endian."""
IndexArray: TypeAlias = NDArray[np.integer[Any]]
"""Positions, as integers of any width."""
Int64Array: TypeAlias = NDArray[np.int64]
Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
