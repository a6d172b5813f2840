"""The pieces that scoring is cut into, and the sums of one: raw bytes of both sides in, sums out.

The shapes of the tensors alone say where they are cut, never threads or memory. A tensor is a sequence of
*grains*: runs of elements with a sum of their own. Neighbouring grains of one size form a *piece*, and a
*task* is the pieces that a thread takes at once. Sums are added grain by grain in the order of the tensor,
so the result has the same bits however grains are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..neurons.layout import Layout
from ..quantization.weight import CodedWeight
from ..storage.threads import lots
from ..tensors.arrays import Float64Array, Int64Array, RawBytes
from ..tensors.header import TensorInfo
from . import kernels
from .code_kernels import row_sums
from .kernels import FORMATS
from .sums import Exact, Sums, exact

_LEAST_RUNS = 64
_TASK_PIECES = 256  # small tensors share a task
_LEAST_SQUARE = 1e-30  # of a sum: below it, float32 squares may have underflowed
_PLAIN_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True)
class CutSizes:
    """How finely the work is cut, in bytes of each side. Of these, results depend on ``piece`` alone."""

    piece: int = 2 << 20  # what is read and summed at once: it stays in a core's cache
    least_task: int = 2 << 20  # what a thread takes at once
    largest_task: int = 32 << 20
    least_window: int = 256 << 10  # what is worth mapping: below it, a copy costs less

    @property
    def span(self) -> int:
        """What is read at once of small tensors; each of them is one piece anyway."""
        return self.piece // 2


CUT_SIZES = CutSizes()


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to compare. Without ``layout`` its change is summed over the whole tensor.

    With ``codes``, ``info`` is of these, a neuron a row, and the sums are of the numbers that they stand for.
    """

    info: TensorInfo
    layout: Layout | None
    codes: tuple[CodedWeight, CodedWeight] | None = None

    @property
    def across(self) -> bool:
        """Whether neighbouring elements belong to different neurons: then columns of runs are summed."""
        return self.layout is not None and self.layout.run[0]

    @property
    def run(self) -> int:
        """Elements of a run; a tensor without neurons is one."""
        return self.info.elements if self.layout is None else self.layout.run[1]


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Elements ``[start, stop)`` of a job's tensor: grains of ``grain`` elements each."""

    job: int
    start: int
    stop: int
    grain: int


def tasks(
    jobs: Sequence[Job], numbers: Iterable[int], task_bytes: int, piece_bytes: int
) -> Iterator[list[TensorPiece]]:
    """The pieces of jobs, of about ``piece_bytes`` of each side; several together, up to ``task_bytes``."""
    pieces = (piece for number in numbers for piece in _pieces(number, jobs[number], piece_bytes))

    def nbytes(piece: TensorPiece) -> int:
        return jobs[piece.job].info.type.nbytes(piece.stop - piece.start)

    return lots(pieces, nbytes, task_bytes, _TASK_PIECES)


def joined(pieces: Iterable[TensorPiece], job: Job) -> Iterator[TensorPiece]:
    """Neighbouring pieces of one job merged into few large ones, where that changes no sum."""
    # Column sums start again with each piece, and so do the sums of types that are not floats.
    if job.across or (job.codes is None and job.info.dtype not in FORMATS):
        yield from pieces
        return
    for grain, group in groupby(pieces, key=lambda piece: piece.grain):
        members = list(group)
        several = len(members) if job.codes is None else 4  # whose scales take memory, too
        for some in (members[first : first + several] for first in range(0, len(members), several)):
            yield TensorPiece(some[0].job, some[0].start, some[-1].stop, grain)


def _pieces(number: int, job: Job, nbytes: int) -> Iterator[TensorPiece]:
    """Cut a tensor into pieces of about ``nbytes``: whole runs, or, where a run is longer, parts of one."""
    total, run = job.info.elements, job.run
    if job.across:  # their sums take 32 bytes per element of a run: worth it only for many runs
        nbytes = min(max(nbytes, _LEAST_RUNS * job.info.type.nbytes(run)), 8 * nbytes)
    limit = max(8, nbytes * 8 // job.info.type.bits // 8 * 8)  # whole bytes for packed types
    if run <= limit:
        step = max(limit // max(run, 1) * run, 1)
        for start in range(0, total, step):
            stop = min(start + step, total)
            yield TensorPiece(number, start, stop, run)
    else:
        for begin in range(0, total, run):
            for start in range(begin, begin + run, limit):
                stop = min(start + limit, begin + run)
                yield TensorPiece(number, start, stop, stop - start)


@dataclass(slots=True)
class PartialSums:
    """A piece's sums: of consecutive neurons from ``first``, or, if there is an ``index``, of its neurons.

    A neuron may occur in ``index`` several times, once per grain: these sums are added one after the other.
    ``all_refined`` means that `refined` holds every doubtful neuron of the piece.
    """

    first: int
    index: Int64Array | None
    sums: Float64Array
    changed: Int64Array
    refined: tuple[Int64Array, Exact] | None = None
    all_refined: bool = False


def partial_sums(job: Job, piece: TensorPiece, a: RawBytes, b: RawBytes) -> PartialSums:
    """The sums of ``piece``, whose bytes are ``a`` in the base and ``b`` in the tuned checkpoint."""
    info = job.info
    if job.codes is not None:
        rows = np.arange(piece.start // piece.grain, piece.stop // piece.grain)
        return PartialSums(int(rows[0]), None, *row_sums(job.codes, rows, a, b))
    if info.dtype not in kernels.FORMATS:
        return PartialSums(0, None, *_plain_sums(info, a, b))
    if job.layout is None:
        return _whole_sums(info, piece.grain, a, b)
    if job.across:
        first, offset = divmod(piece.start, job.run)
        owners = job.layout.run_neurons(first, first + (piece.stop - piece.start) // piece.grain)
        return _column_sums(info, owners + offset, piece.grain, *_carried(info, a, b))
    return _run_sums(info, job.layout, piece, a, b)


def _carried(info: TensorInfo, a: RawBytes, b: RawBytes) -> tuple[NDArray[Any], NDArray[Any]]:
    return a.view(info.type.carrier), b.view(info.type.carrier)


def _run_sums(info: TensorInfo, layout: Layout, piece: TensorPiece, a: RawBytes, b: RawBytes) -> PartialSums:
    """Sums of runs of one neuron each, or of parts of such runs."""
    count = (piece.stop - piece.start) // piece.grain
    sums, changed = np.empty((3, count)), np.empty(count, np.int64)
    kernels.run_sums(info.dtype)(*_carried(info, a, b), piece.grain, sums, changed)
    run = layout.run[1]
    first = piece.start // run
    if piece.grain < run:
        runs = (piece.start + piece.grain * np.arange(count)) // run
        return PartialSums(0, layout.run_neurons(first, int(runs[-1]) + 1)[runs - first], sums, changed)
    if not layout.contiguous:
        return PartialSums(0, layout.run_neurons(first, first + count), sums, changed)
    result = PartialSums(first, None, sums, changed, all_refined=True)
    # These are whole vectors, still in memory: refine the doubtful ones now.
    doubtful = Sums(sums.copy(), changed).doubtful(info.dtype)
    if len(doubtful):
        rows_a, rows_b = (side.reshape(count, -1) for side in (a, b))
        result.refined = (doubtful + first, exact(info.dtype, rows_a, rows_b, doubtful))
    return result


def _column_sums(
    info: TensorInfo, owners: Int64Array, length: int, a: NDArray[Any], b: NDArray[Any]
) -> PartialSums:
    """Sums of runs across neurons; runs that start at the same neuron are summed together."""
    kernel = kernels.column_sums(info.dtype)
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    sums = np.zeros((len(edges) - 1, 3, length))
    changed = np.zeros((len(edges) - 1, length), np.int64)
    for number, (low, high) in enumerate(pairwise(edges)):
        part = slice(low * length, high * length)
        kernel(a[part], b[part], length, sums[number], changed[number])
    if len(edges) == 2:
        return PartialSums(int(owners[0]), None, sums[0], changed[0])
    index = (owners[edges[:-1]][:, None] + np.arange(length)).ravel()
    return PartialSums(0, index, sums.transpose(1, 0, 2).reshape(3, -1), changed.ravel())


def _whole_sums(info: TensorInfo, grain: int, a: RawBytes, b: RawBytes) -> PartialSums:
    """Sums over all elements of each grain, without NaN and Inf."""
    x, y = _carried(info, a, b)
    count = len(x) // grain
    sums, changed = np.empty((3, count)), np.empty(count, np.int64)
    kernels.run_sums(info.dtype)(x, y, grain, sums, changed)
    with np.errstate(invalid="ignore"):
        lost = ~np.isfinite(sums).all(axis=0) | (sums[0] < _LEAST_SQUARE)
        lost |= (changed > 0) & (sums[1] < _LEAST_SQUARE)
    for number in np.flatnonzero(lost):
        rows = (side.reshape(count, -1)[number : number + 1] for side in (a, b))
        sums[:, number] = _finite_sums(info, *rows)
    return PartialSums(0, np.zeros(count, np.int64), sums, changed)


def _finite_sums(info: TensorInfo, a: RawBytes, b: RawBytes) -> list[float]:
    """Float64 sums over one grain, shape ``[1, bytes]``, without NaN and Inf."""
    whole = exact(info.dtype, a, b)
    if not whole.finite[0]:
        each_a, each_b = (side.reshape(-1, info.type.itemsize) for side in (a, b))
        whole = exact(info.dtype, each_a, each_b)
    with np.errstate(all="ignore"):
        factor = whole.scale[whole.finite] ** -2
        return [float((part[whole.finite] * factor).sum()) for part in (whole.aa, whole.dd, whole.ad)]


def _plain_sums(info: TensorInfo, a: RawBytes, b: RawBytes) -> tuple[Float64Array, Int64Array]:
    """As `_whole_sums` for integers and complex numbers; codes of a packed type only count as changed."""
    if info.type.kind == "packed":
        bits = np.unpackbits(a ^ b, bitorder="little").reshape(-1, info.type.bits)
        return np.zeros((3, 1)), np.array([np.count_nonzero(bits.any(axis=1))])
    raw_a, raw_b = a.view(info.type.carrier), b.view(info.type.carrier)
    # A byte of a bool may hold any number.
    plain = info.type.carrier if info.type.kind == "bool" else info.type.numpy
    # float64 does not hold every 64-bit integer; x86's long double does, and is slow.
    large = np.longdouble if info.type.itemsize == 8 else np.float64
    wide: np.dtype[Any] = np.dtype(np.complex128 if info.type.kind == "complex" else large)
    sums = np.zeros((3, 1))
    for start in range(0, len(raw_a), _PLAIN_ELEMENTS):  # in small parts: widened, they take more memory
        part = slice(start, start + _PLAIN_ELEMENTS)
        with np.errstate(all="ignore"):  # signalling NaNs, and squares out of range
            x, y = (side[part].view(plain).astype(wide) for side in (raw_a, raw_b))
            for total, values in zip(sums, (x, y - x), strict=False):
                squares = np.abs(values) ** 2
                total += float(np.where(np.isfinite(squares), squares, 0).sum())
    return sums, np.array([np.count_nonzero(raw_a != raw_b)])
