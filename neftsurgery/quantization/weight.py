"""A quantized weight: the tensors that hold it, and the numbers of any of its rows.

Its codes are rows of one tensor. What else a row needs are rows of *companions*: scales, zero points. A row
of a companion may serve several rows of codes, so these can only change together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError
from ..tensors.arrays import Float32Array, Float64Array, Int64Array, RawBytes
from ..tensors.dtypes import DTYPES
from ..tensors.floats import FLOATS, widen
from ..tensors.header import TensorInfo
from ..tensors.reader import RowReader, WeightReader

Numbers = NDArray[np.floating[Any]]

#: What codes may be: an 8-bit dtype of safetensors; ``E2M1``; integers stored with an offset, so that the
#: lowest is 0. And how many bits the fraction of such a number has, with its leading one.
CODE_BITS = {"F8_E4M3": 4, "F8_E5M2": 3, "E2M1": 2, "I8": 8, "offset 8": 8, "offset 4": 4}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)


@cache
def code_table(kind: str) -> tuple[Float32Array, int]:
    """The numbers that bytes of codes stand for, one byte's behind the other's; and how many each has.

    Of codes of four bits, the low one comes first.
    """
    every = np.arange(256)
    if kind in ("E2M1", "offset 4"):
        halves = _E2M1 if kind == "E2M1" else np.arange(-8, 8, dtype=np.float32)
        return np.stack([halves[every & 15], halves[every >> 4]], axis=1).reshape(-1), 2
    if kind in ("I8", "offset 8"):
        return (every - 128 if kind == "offset 8" else every - 256 * (every > 127)).astype(np.float32), 1
    return widen(every.astype(np.uint8), kind).astype(np.float32), 1


def scales_decoded(raw: RawBytes, dtype: str) -> Float64Array:
    """The values of scales: floats, or bytes of E8M0, ``2 ** (code - 127)`` where 255 is NaN."""
    if dtype in FLOATS:
        return widen(raw, dtype)
    if dtype in ("U8", "F8_E8M0"):
        return E8M0.take(raw)
    return np.ascontiguousarray(raw).view(DTYPES[dtype].numpy).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor beside the codes, and how many neighbouring rows of codes share a row of it."""

    info: TensorInfo
    span: int
    axes: tuple[int, ...]  # along which its rows lie; none: it has one row, which serves all codes

    @classmethod
    def of(cls, info: TensorInfo, shape: tuple[int, ...], span: int) -> Companion:
        """That of codes of a ``shape``, of whose rows ``span`` neighbours share one of the companion."""
        return cls(info, span, tuple(range(len(shape) - 1)))

    @classmethod
    def shared(cls, info: TensorInfo, shape: tuple[int, ...]) -> Companion:
        """One that all rows share."""
        return cls(info, math.prod(shape[:-1]), ())

    @property
    def count(self) -> int:
        """How many rows it has."""
        return math.prod(self.info.shape[axis] for axis in self.axes)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as codes with scales. Its numbers are ``(code - zero point) * scale``."""

    layout: str  # how patches and messages call the way it is stored
    info: TensorInfo  # the weight that models have: its numbers in F32, or F64 where products need that
    codes: TensorInfo
    shape: tuple[int, ...]  # of the codes, one a number: rows along all axes but the last
    kind: str  # of the codes, see `CODE_BITS`
    scales: Companion
    columns: int  # neighbouring codes of a row that share a scale
    zeros: Companion | None = None
    packed_zeros: bool = False  # whether they are packed along the rows
    order: Companion | None = None  # the group of each column, where that is not by neighbourhood
    others: tuple[Companion, ...] = ()  # what else belongs to it and holds no number
    transposed: bool = False  # whether the last two axes of the weight are swapped in the codes

    @cached_property
    def companions(self) -> Mapping[str, Companion]:
        """All tensors of it by role, codes first."""
        roles: dict[str, Companion | None] = {
            "codes": Companion.of(self.codes, self.shape, 1),
            "scales": self.scales,
            "zero_points": self.zeros,
            "group_index": self.order,
            **{one.info.name.rpartition("_")[2]: one for one in self.others},
        }
        return {role: one for role, one in roles.items() if one is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(one.info.nbytes for one in self.companions.values())

    @property
    def unit(self) -> str:
        """What of it can be replaced by itself, in words."""
        span = max((one.span for one in (self.scales, self.zeros, self.order) if one is not None), default=1)
        if span == 1:
            return "row by row, each with its scales"
        if span >= self.companions["codes"].count:
            return "row by row; all rows where the scales change, which they share"
        return f"row by row; {span} rows together where the scales change, which they share"

    def describe(self) -> dict[str, object]:
        """For JSON: its layout, and its tensors by role."""
        members = {role: one.info.name for role, one in self.companions.items()}
        return {"layout": self.layout, "unit": self.unit, "tensors": members}

    @property
    def row_axes(self) -> tuple[int, ...]:
        """The axes of the weight along which rows of codes lie: neurons along these can be cut out."""
        last = len(self.shape) - 1
        return tuple(axis for axis in range(last + 1) if axis != last - self.transposed)

    @property
    def code_type(self) -> str:
        """A dtype whose elements are as large as a code."""
        return "U8" if code_table(self.kind)[1] == 1 else "F4"

    def summed_as(self, other: QuantizedWeight) -> bool:
        """Whether sums of rows follow from the codes and scales of both: see `code_kernels`."""
        alike = all(getattr(self, key) == getattr(other, key) for key in ("shape", "kind", "columns"))
        plain = all(one.zeros is None and one.order is None for one in (self, other))
        whole = self.kind in FLOATS or (self.code_type == "F4" and not (self.columns | self.shape[-1]) % 32)
        return alike and plain and whole and self.columns > 1

    def shared_rows(self, companion: Companion, rows: Int64Array) -> Int64Array:
        """The row of a companion that each of ``rows`` needs."""
        return shared_rows(rows, self.shape[-2], companion.span, companion.count)

    def scale_rows(
        self, files: RowReader, rows: Int64Array, decoded: bool = True
    ) -> tuple[NDArray[Any], Int64Array]:
        """The scales that ``rows`` (ascending) need, ``[n, groups]``, or their bytes; and which each has."""
        raw, place = _shared(files, self, self.scales, rows)
        return scales_decoded(raw, self.scales.info.dtype) if decoded else raw, place

    def numbers(
        self,
        files: RowReader,
        rows: Int64Array,
        out: Numbers,
        first: int = 0,
        codes: RawBytes | None = None,
    ) -> None:
        """Fill ``out``, ``[k, n]``, with the numbers of ``rows`` (ascending) in ``n`` columns from ``first``.

        They are computed in its type. ``codes``: the bytes of these rows, if they are at hand.
        """
        raw = rows_read(files, self.companions["codes"], rows) if codes is None else codes
        table, per_byte = code_table(self.kind)
        last, (scales, place) = first + out.shape[1], self.scale_rows(files, rows)
        groups = None if self.order is None else self._groups(files, self.order, scales.shape[1])
        of = np.arange(first, last) // self.columns if groups is None else groups[first:last]
        table = table.astype(out.dtype).reshape(256, per_byte)
        halves = table[raw[:, first // per_byte : -(-last // per_byte)]].reshape(len(rows), -1)
        out[:] = halves[:, first % per_byte :][:, : out.shape[1]]
        with np.errstate(all="ignore"):  # a scale that is no number, or too large, is found where it is used
            if self.zeros is not None:
                out -= self._zeros(files, rows).astype(out.dtype)[:, of]
            out *= scales.astype(out.dtype)[place][:, of]

    def _zeros(self, files: RowReader, rows: Int64Array) -> Numbers:
        """The zero points of ``rows``, one a scale."""
        assert self.zeros is not None  # asked for only then
        stored, place = _shared(files, self, self.zeros, rows)
        raw = stored[place]
        if not self.packed_zeros:
            return scales_decoded(raw, self.zeros.info.dtype)
        bits = 32 // self.zeros.span
        shift = (rows % self.shape[-2] % self.zeros.span * bits).astype(np.uint32)
        words = np.ascontiguousarray(raw).view(np.uint32) >> shift[:, None]
        return (words & np.uint32((1 << bits) - 1)).astype(np.float64) - (1 << (bits - 1))

    def _groups(self, files: RowReader, order: Companion, count: int) -> Int64Array | None:
        """The group of each column; None if that is by neighbourhood after all."""
        raw = rows_read(files, order, np.zeros(1, np.int64))
        found: Int64Array = raw[0].view(order.info.type.numpy).astype(np.int64)
        if (found == -1).any():
            return None
        if found.min() < 0 or found.max() >= count:
            raise CorruptFileError(
                f"a column is in a group that has no scales in {self.scales.info.name}",
                tensor=order.info.name,
                expected=f"groups below {count}",
                found=int(found.max() if found.max() >= count else found.min()),
            )
        return found


class CodedWeight(NamedTuple):
    """A quantized weight, and the files that hold it, in which its codes have its name too."""

    files: WeightReader
    weight: QuantizedWeight


def shared_rows(rows: Int64Array, inner: int, span: int, count: int) -> Int64Array:
    """Which of ``count`` rows of a companion each of ``rows`` needs, ``inner`` of which make a matrix."""
    if count == 1:
        return np.zeros_like(rows)
    return rows // inner * -(-inner // span) + rows % inner // span


def rows_read(files: RowReader, companion: Companion, rows: Int64Array) -> RawBytes:
    """The bytes of ascending rows of a tensor."""
    raw = np.empty((len(rows), companion.info.nbytes // companion.count), np.uint8)
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        files.read_into(companion.info.name, int(rows[0]) * raw.shape[1], raw.reshape(-1).data)
    else:
        files.read_rows(companion.info.name, rows, raw)
    return raw


def _shared(
    files: RowReader, weight: QuantizedWeight, companion: Companion, rows: Int64Array
) -> tuple[RawBytes, Int64Array]:
    """The bytes of the rows of a companion that ascending ``rows`` need, and which of them each needs."""
    needed = weight.shared_rows(companion, rows)
    new = np.diff(needed, prepend=-1) > 0
    return rows_read(files, companion, needed[new]), np.cumsum(new) - 1
