"""Streams two sets of weights past the kernels: bounded reads, several in flight, results in order.

The work is cut into pieces by the shapes of the tensors alone, and results are joined in the order
of the pieces: the outcome has the same bits for any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import Layout
from ..checkpoint.pipeline import in_order
from ..checkpoint.vectors import blocks, gather
from . import kernels
from .sums import Exact, Sums, exact

__all__ = ["Job", "TensorResult", "Weights", "stream"]

_PIECE_BYTES = 2 << 20  # of each side
_BATCH_PIECES = 256  # small tensors share a task
_LEAST_SQUARE = 1e-30  # of a sum: below, float32 squares may have vanished


class Weights(Protocol):
    """What scoring sees of a model: tensors by name, and any bytes of them. Must be thread-safe."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors, by name."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of tensor ``name`` from its byte ``start``."""


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to compare. Without ``layout`` its change is summed over the whole tensor."""

    info: TensorInfo
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What comparing one tensor gave.

    Attributes
    ----------
    job:
        What was asked.
    sums:
        Per neuron, if the job has a layout.
    base_sq, delta_sq, changed:
        Over the whole tensor: squared norms of the base and of the difference (finite elements only;
        0 for types that are no plain numbers), and elements whose bits differ.
    """

    job: Job
    sums: Sums | None
    base_sq: float
    delta_sq: float
    changed: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements ``[start, stop)`` of a job's tensor: whole runs, or a part of one."""

    job: int
    start: int
    stop: int
    last: bool


@dataclass(slots=True)
class _PieceSums:
    """A piece's sums: over consecutive neurons from ``first``, or, with ``index``, over those named."""

    first: int
    index: NDArray[np.int64] | None
    sums: NDArray[np.float64]
    changed: NDArray[np.int64]
    refined: tuple[NDArray[np.int64], Exact] | None = None


def stream(
    base: Weights,
    tuned: Weights,
    jobs: Sequence[Job],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[TensorResult]:
    """Compare ``jobs`` one after the other; yields a result a job, in order.

    Each thread holds two buffers of 2 MiB. ``progress`` is told the bytes read, from the caller's
    thread.
    """
    engine = _Engine(base, tuned, jobs)
    for batch, results in in_order(engine.run, _batches(jobs), threads):
        for piece, result in zip(batch, results, strict=True):
            finished = engine.collect(piece, result)
            if progress is not None:
                progress(2 * jobs[piece.job].info.type.nbytes(piece.stop - piece.start))
            if finished is not None:
                yield finished


class _Engine:
    def __init__(self, base: Weights, tuned: Weights, jobs: Sequence[Job]) -> None:
        self._base, self._tuned, self._jobs = base, tuned, jobs
        self._local = threading.local()
        self._open: _Collector | None = None

    def run(self, batch: Sequence[_Piece]) -> list[_PieceSums]:
        """Read and sum a batch of pieces; called in the worker threads."""
        return [self._sum(self._jobs[piece.job], piece, *self._read(piece)) for piece in batch]

    def _read(self, piece: _Piece) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        info = self._jobs[piece.job].info
        start, size = info.type.nbytes(piece.start), info.type.nbytes(piece.stop - piece.start)
        buffers = getattr(self._local, "buffers", None)
        if buffers is None or buffers.shape[1] < size:
            buffers = self._local.buffers = np.empty((2, max(size, _PIECE_BYTES)), np.uint8)
        for weights, buffer in ((self._base, buffers[0, :size]), (self._tuned, buffers[1, :size])):
            weights.read_into(info.name, start, buffer.data)
        return buffers[0, :size], buffers[1, :size]

    def _sum(self, job: Job, piece: _Piece, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> _PieceSums:
        if job.info.dtype not in kernels.FORMATS:
            return _PieceSums(0, None, *_plain_sums(job.info, a, b))
        if job.layout is None:
            return _PieceSums(0, None, *_whole_sums(job.info, a, b))
        return _neuron_sums(job.info, job.layout, piece, a, b)

    def collect(self, piece: _Piece, result: _PieceSums) -> TensorResult | None:
        """Join the result of ``piece``; after a tensor's last piece, the tensor's result."""
        job = self._jobs[piece.job]
        if self._open is None:
            self._open = _Collector(job)
        self._open.add(result)
        if not piece.last:
            return None
        finished, self._open = self._open.finish(self._base, self._tuned), None
        return finished


class _Collector:
    """The sums of the tensor whose pieces are coming in."""

    def __init__(self, job: Job) -> None:
        self._job = job
        count = 1 if job.layout is None else job.layout.count
        self._sums = np.zeros((3, count))
        self._changed = np.zeros(count, np.int64)
        self._settled = np.zeros(count, np.bool_)
        self._refined: list[tuple[NDArray[np.int64], Exact]] = []

    def add(self, result: _PieceSums) -> None:
        with np.errstate(all="ignore"):  # NaN, Inf and overflow are looked at in `finish`
            if result.index is None:
                here = slice(result.first, result.first + len(result.changed))
                self._sums[:, here] += result.sums
                self._changed[here] += result.changed
            else:
                for row, values in zip(self._sums, result.sums, strict=True):
                    np.add.at(row, result.index, values)
                np.add.at(self._changed, result.index, result.changed)
        if result.refined is not None:
            self._refined.append(result.refined)
            self._settled[result.refined[0]] = True

    def finish(self, base: Weights, tuned: Weights) -> TensorResult:
        info, layout = self._job.info, self._job.layout
        if layout is None:
            (aa, dd), changed = self._sums[:2, 0], int(self._changed[0])
            return TensorResult(self._job, None, float(aa), float(dd), changed)
        sums = Sums(self._sums, self._changed)
        for index, values in self._refined:
            sums.refine(index, values)
        doubtful = sums.doubtful(info.dtype)
        doubtful = doubtful[~self._settled[doubtful]]
        for start, stop in blocks(info, layout, len(doubtful)):
            some = doubtful[start:stop]
            vectors = (gather(side, info, layout, some) for side in (base, tuned))
            sums.refine(some, exact(info.dtype, *vectors))
        good = sums.finite
        with np.errstate(over="ignore"):
            totals = sums.aa[good].sum(), sums.dd[good].sum()
        return TensorResult(self._job, sums, float(totals[0]), float(totals[1]), int(sums.changed.sum()))


def _neuron_sums(
    info: TensorInfo, layout: Layout, piece: _Piece, a: NDArray[np.uint8], b: NDArray[np.uint8]
) -> _PieceSums:
    """The sums of the neurons that a piece touches."""
    a, b = a.view(info.type.carrier), b.view(info.type.carrier)
    across, run = layout.run
    first, offset = divmod(piece.start, run)
    length = min(run, piece.stop - piece.start)  # less than a run: a part of one
    runs = len(a) // length
    if across:
        owners = layout.run_neurons(first, first + runs)
        return _lane_sums(info, owners + offset, length, a, b)
    sums, changed = np.empty((3, runs)), np.empty(runs, np.int64)
    kernels.run_sums(info.dtype)(a, b, length, sums, changed)
    if not layout.contiguous:
        return _PieceSums(0, layout.run_neurons(first, first + runs), sums, changed)
    result = _PieceSums(first, None, sums, changed)
    if length == run:  # whole vectors, still at hand: settle the doubtful ones here and now
        doubtful = Sums(sums.copy(), changed).doubtful(info.dtype)
        if len(doubtful):
            rows_a, rows_b = (side.reshape(runs, length)[doubtful].view(np.uint8) for side in (a, b))
            result.refined = (doubtful + first, exact(info.dtype, rows_a, rows_b))
    return result


def _lane_sums(
    info: TensorInfo,
    owners: NDArray[np.int64],
    length: int,
    a: NDArray[np.unsignedinteger],
    b: NDArray[np.unsignedinteger],
) -> _PieceSums:
    """Runs across neurons: those that start at the same neuron are summed together."""
    kernel = kernels.lane_sums(info.dtype)
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    sums = np.zeros((len(edges) - 1, 3, length))
    changed = np.zeros((len(edges) - 1, length), np.int64)
    for number, (low, high) in enumerate(pairwise(edges)):
        part = slice(low * length, high * length)
        kernel(a[part], b[part], length, sums[number], changed[number])
    if len(edges) == 2:
        return _PieceSums(int(owners[0]), None, sums[0], changed[0])
    index = (owners[edges[:-1]][:, None] + np.arange(length)).ravel()
    return _PieceSums(0, index, sums.transpose(1, 0, 2).reshape(3, -1), changed.ravel())


def _whole_sums(
    info: TensorInfo, a: NDArray[np.uint8], b: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums over all elements of a piece, NaN and Inf left out."""
    x, y = a.view(info.type.carrier), b.view(info.type.carrier)
    sums, changed = np.empty((3, 1)), np.empty(1, np.int64)
    kernels.run_sums(info.dtype)(x, y, len(x), sums, changed)
    lost = sums[0, 0] < _LEAST_SQUARE or (changed[0] and sums[1, 0] < _LEAST_SQUARE)
    if lost or not np.isfinite(sums).all():
        whole = exact(info.dtype, a.reshape(1, -1), b.reshape(1, -1))
        if not whole.finite[0]:
            whole = exact(info.dtype, a.reshape(len(x), -1), b.reshape(len(x), -1))
        with np.errstate(all="ignore"):
            factor = whole.scale[whole.finite] ** -2
            sums[:, 0] = [(part[whole.finite] * factor).sum() for part in (whole.aa, whole.dd, whole.ad)]
    return sums, changed


_PLAIN_ELEMENTS = 1 << 15
_PLAIN = {"BOOL": "u1", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4"}
_PLAIN |= {"I64": "<i8", "U64": "<u8", "C64": "<c8"}


def _plain_sums(
    info: TensorInfo, a: NDArray[np.uint8], b: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """As `_whole_sums` for integers and complex numbers; codes of a packed type only count as changed."""
    if info.dtype not in _PLAIN:
        bits = np.unpackbits(a ^ b, bitorder="little").reshape(-1, info.type.bits)
        return np.zeros((3, 1)), np.array([np.count_nonzero(bits.any(axis=1))])
    raw_a, raw_b = a.view(info.type.carrier), b.view(info.type.carrier)
    # float64 does not hold every 64-bit integer; x86's long double does, and is slow.
    large = np.longdouble if info.type.itemsize == 8 else np.float64
    wide: np.dtype[Any] = np.dtype(np.complex128 if info.type.kind == "complex" else large)
    sums = np.zeros((3, 1))
    for start in range(0, len(raw_a), _PLAIN_ELEMENTS):  # widened in small parts: they take much more memory
        part = slice(start, start + _PLAIN_ELEMENTS)
        x, y = (side[part].view(_PLAIN[info.dtype]).astype(wide) for side in (raw_a, raw_b))
        with np.errstate(all="ignore"):
            for total, values in zip(sums, (x, y - x), strict=False):
                squares = np.abs(values) ** 2
                total += float(np.where(np.isfinite(squares), squares, 0).sum())
    return sums, np.array([np.count_nonzero(raw_a != raw_b)])


def _pieces(number: int, job: Job) -> Iterator[_Piece]:
    """Cut a tensor into pieces of about 2 MiB: whole runs, or, where a run is longer, parts of one."""
    total = job.info.elements
    run = total if job.layout is None else job.layout.run[1]
    limit = max(8, _PIECE_BYTES * 8 // job.info.type.bits // 8 * 8)  # whole bytes for packed types
    if run <= limit:
        step = limit // max(run, 1) * run
        for start in range(0, total, max(step, 1)):
            stop = min(start + step, total)
            yield _Piece(number, start, stop, stop == total)
    else:
        for begin in range(0, total, run):
            for start in range(begin, begin + run, limit):
                stop = min(start + limit, begin + run)
                yield _Piece(number, start, stop, stop == total)


def _batches(jobs: Sequence[Job]) -> Iterator[list[_Piece]]:
    """Pieces in order, small ones together, so that a task is worth its overhead."""
    batch: list[_Piece] = []
    size = 0
    for number, job in enumerate(jobs):
        for piece in _pieces(number, job):
            nbytes = job.info.type.nbytes(piece.stop - piece.start)
            if batch and (size + nbytes > _PIECE_BYTES or len(batch) >= _BATCH_PIECES):
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += nbytes
    if batch:
        yield batch
