"""What a config says of quantization, with the tensors that it is about: what layouts are read from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from ..errors import CorruptFileError, MismatchError
from ..tensors.floats import FLOATS
from ..tensors.header import TensorInfo
from .weight import CODE_BITS, Companion, QuantizedWeight

#: Rows and columns that share a scale; 0: all of them.
ScaleBlock = tuple[int, int]

_MOST_SHAPE_BYTES = 64
_EXACT_BITS = 24  # of a number in F32
_SCALE_BITS = {"U8": 1, "F8_E8M0": 1}


def quantization_section(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The part of a ``config.json`` that says how weights are quantized; empty if none does."""
    holders = [config or {}]
    holders += [value for value in holders[0].values() if isinstance(value, Mapping)]
    for holder in holders:
        for key in ("quantization_config", "compression_config", "quantization"):
            section = holder.get(key)
            if isinstance(section, Mapping) and section:
                return section
    return {}


@dataclass(frozen=True, slots=True)
class Settings:
    """The section of a config about quantization, and the tensors of the checkpoint ``name``."""

    name: str
    section: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    absent: Collection[str]  # tensors that the index lists and no file has
    read: Callable[[str, int, memoryview], None]  # bytes of a tensor, as `TensorReader.read_into`

    def get(self, key: str) -> Any:
        """A value of the section."""
        return self.section.get(key)

    def of_dtypes(self, *dtypes: str) -> Iterator[TensorInfo]:
        """The tensors of some dtypes that are matrices, or several, and not empty."""
        some = (info for info in self.tensors.values() if info.dtype in dtypes)
        return (info for info in some if len(info.shape) > 1 and info.elements)

    def required(self, codes: TensorInfo, names: Sequence[str]) -> TensorInfo:
        """The first tensor of ``names`` that is there; without one of them, ``codes`` mean nothing."""
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        lost = next((name for name in names if name in self.absent), None)
        raise CorruptFileError(
            "its scales are missing" if lost is None else f"the index lists {lost}, and no file has it",
            file=self.name,
            tensor=codes.name,
            expected=lost or names[0],
            found="no such tensor",
            hint="codes mean nothing without it: fetch or save the checkpoint again",
        )

    def unlike(self, codes: TensorInfo, other: TensorInfo, expected: str) -> MismatchError:
        """The error for a tensor that does not go with its codes."""
        return MismatchError(
            f"{other.name} does not fit the codes {codes.describe()}",
            file=self.name,
            tensor=codes.name,
            expected=expected,
            found=other.describe(),
            hint="config.json, codes and scales disagree: fetch or save the checkpoint again",
        )

    def free(self, name: str, codes: TensorInfo) -> str:
        """The name of the weight that codes stand for; an error if a tensor has it already."""
        if name != codes.name and name in self.tensors:
            raise MismatchError(
                f"the checkpoint has both {name} and its codes", file=self.name, tensor=codes.name
            )
        return name

    def whole_numbers(self, info: TensorInfo) -> tuple[int, ...]:
        """The content of a small tensor of integers: a shape."""
        if info.dtype not in ("I64", "I32") or not 0 < info.nbytes <= _MOST_SHAPE_BYTES:
            raise CorruptFileError(
                "expected a shape", file=self.name, tensor=info.name, found=info.describe()
            )
        raw = np.empty(info.nbytes, np.uint8)
        self.read(info.name, 0, raw.data)
        return tuple(raw.view(info.type.numpy).tolist())

    def scaled(
        self,
        layout: str,
        codes: TensorInfo,
        shape: tuple[int, ...],
        kind: str,
        scale: TensorInfo,
        allowed: Sequence[ScaleBlock],
    ) -> QuantizedWeight:
        """Codes of a weight of ``shape`` whose scales are those of one of the ``allowed`` blocks."""
        *outer, rows, columns = shape
        name, format = self.free(codes.name.removesuffix("_packed"), codes), scale.type.format
        fraction = _EXACT_BITS if format is None else format.fraction_bits + 1  # with its leading one
        for block in allowed:
            high, wide = block[0] or rows, block[1] or columns
            grid = (*outer, -(-rows // high), -(-columns // wide))
            forms = [grid, grid[:-1]] if wide >= columns else [grid]
            forms += [(), (1,), (1,) * len(shape)] if block == (0, 0) else []
            if scale.shape in forms and (scale.dtype in FLOATS or scale.dtype in _SCALE_BITS):
                bits = CODE_BITS[kind] + _SCALE_BITS.get(scale.dtype, fraction)
                weight = TensorInfo(name, "F32" if bits <= _EXACT_BITS else "F64", shape)
                shared = Companion.of(scale, shape, high)
                if scale.elements == 1:
                    shared = Companion.shared(scale, shape)
                return QuantizedWeight(layout, weight, codes, shape, kind, shared, wide)
        high, wide = allowed[0] if allowed else (1, 0)
        raise self.unlike(
            codes, scale, f"scales for blocks of {high or rows} x {wide or columns}, by config.json"
        )


def is_block(value: object) -> TypeGuard[list[int]]:
    """Whether a value of a config is the rows and columns of a block."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    )
