"""Streams two sets of weights through the kernels: bounded reads, several in flight, results in order.

Small tensors that lie one after the other in their files are read in one go. Of such a span, those of one
dtype, shape and layout make a *stack*: one tensor with an axis more. A neuron's sums have the same bits in a
stack as in its tensor, as both are one piece.

The work is cut into pieces by the shapes of the tensors alone, and results are joined in the order of the
pieces. So the result has the same bits for any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np

from ..checkpoint.in_memory import TensorsInMemory
from ..errors import CorruptFileError
from ..neurons.layout import Layout
from ..neurons.vectors import block_memory, blocks, gather
from ..storage.page_cache import is_truncated, sigbus_guard
from ..storage.threads import Dispatch, Limits, in_order
from ..tensors.arrays import Float64Array, Int64Array, RawBytes
from ..tensors.header import TensorInfo
from ..tensors.reader import RowReader, WeightReader, neighbours
from .kernels import FORMATS
from .partial_sums import CUT_SIZES, CutSizes, Job, PartialSums, TensorPiece, joined, partial_sums, tasks
from .sums import Exact, Sums, exact

_LEAST_MEMBERS = 8  # of a span that is as large as may be


@dataclass(frozen=True, slots=True)
class TensorResult:
    """The result of comparing one tensor, or several of one dtype, shape and layout."""

    jobs: Sequence[Job]
    sums: Sums | None  # per neuron, tensor after tensor, if the jobs have a layout
    # Over all elements: squared norms of the base and of the difference (of finite elements only; 0 for
    # packed types), and the number of elements whose bits differ.
    base_sq: float
    delta_sq: float
    changed: int


def stream(
    base: WeightReader,
    tuned: WeightReader,
    jobs: Sequence[Job],
    *,
    limits: Limits,
    sizes: CutSizes = CUT_SIZES,
    progress: Callable[[int], None] | None = None,
    stacked: bool = False,
    dispatch: Dispatch | None = None,
) -> Iterator[TensorResult]:
    """Compare the tensors of ``jobs``; yields one result per job, in order.

    Or, ``stacked``, one for several small tensors that are neighbours in their files, or nearly so.
    Buffers and mapped windows keep to ``limits``. ``progress`` gets the bytes read, on the caller's thread.
    With ``dispatch``, an executor runs `Engine.run`.
    """
    engine = Engine(base, tuned, jobs, limits, sizes)
    workers = limits.workers(2 * sizes.least_task)
    share = min(limits.memory // 2, sum(job.info.nbytes for job in jobs) // 8) // workers
    task_bytes = min(max(share, sizes.least_task), sizes.largest_task)
    runs = spans(base, tuned, jobs, sizes.span if stacked else 0)

    def work() -> Iterator[Sequence[TensorPiece] | range]:
        for several, group in groupby(runs, key=lambda run: len(run) > 1):
            if several:
                yield from group
            else:
                alone = [number for run in group for number in run]
                yield from tasks(jobs, alone, task_bytes, sizes.piece)

    def nbytes(task: Sequence[TensorPiece] | range) -> int:
        return sizes.span if isinstance(task, range) else task_bytes

    results = in_order(engine.run, work(), workers, nbytes=nbytes, dispatch=dispatch)
    with (
        sigbus_guard() if limits.mapped else nullcontext(),
        closing(results) as done,  # no thread reads on without the guard
    ):
        summed = (one for _, several in done for one in several)
        for number, group in groupby(summed, key=lambda one: one[0].job):
            job, collector = jobs[number], _Collector(jobs[number])
            for piece, result in group:
                if progress is not None:
                    progress(2 * job.info.type.nbytes(piece.stop - piece.start))
                if isinstance(result, PartialSums):
                    collector.add(result)
            yield result if isinstance(result, TensorResult) else collector.finish(base, tuned, limits)


class Engine:
    """Reads and sums tasks, here or in another process."""

    def __init__(
        self, base: WeightReader, tuned: WeightReader, jobs: Sequence[Job], limits: Limits, sizes: CutSizes
    ) -> None:
        self._base, self._tuned, self._jobs, self._limits = base, tuned, jobs, limits
        self._least_window, self._local = sizes.least_window, threading.local()

    def run(
        self, task: Sequence[TensorPiece] | range
    ) -> Sequence[tuple[TensorPiece, PartialSums | TensorResult]]:
        """Read and sum the pieces of a task, or the tensors of a span; called in the worker threads."""
        return list(self._stacks(task)) if isinstance(task, range) else self._pieces(task)

    def _stacks(self, span: range) -> Iterator[tuple[TensorPiece, TensorResult]]:
        jobs = self._jobs[span.start : span.stop]
        size = sum(job.info.nbytes for job in jobs)
        sides = self._buffers(size)[:, :size]
        for weights, side in zip((self._base, self._tuned), sides, strict=True):
            weights.read_into(jobs[0].info.name, 0, side.data)
        number = span.start
        for members, stack, parts in stacks(jobs, list(sides)):
            name, piece = stack.info.name, TensorPiece(number, 0, stack.info.elements, stack.run)
            collector = _Collector(stack)
            collector.add(partial_sums(stack, piece, *parts))
            a, b = (TensorsInMemory({name: part}, name) for part in parts)
            yield piece, replace(collector.finish(a, b, Limits.of(1)), jobs=members)
            number += 1  # any of the span, once

    def _pieces(self, task: Sequence[TensorPiece]) -> list[tuple[TensorPiece, PartialSums | TensorResult]]:
        results: list[tuple[TensorPiece, PartialSums | TensorResult]] = []
        for number, group in groupby(task, key=lambda piece: piece.job):
            job, pieces = self._jobs[number], list(group)
            sides = (self._base, self._tuned) if job.codes is None else [one.files for one in job.codes]
            windows = self._windows(sides, job.info, pieces[0].start, pieces[-1].stop)
            at_hand = all(window is not None for window in windows)
            for piece in joined(pieces, job) if at_hand else pieces:
                a, b = self._read(sides, job.info, pieces[0].start, piece, windows)
                results.append((piece, partial_sums(job, piece, a, b)))
            if any(window is not None and is_truncated(window) for window in windows):
                raise CorruptFileError(
                    "the file ends too soon: it was truncated while it was read", tensor=job.info.name
                )
        return results

    def _windows(
        self, sides: Sequence[WeightReader], info: TensorInfo, start: int, stop: int
    ) -> list[RawBytes | None]:
        """A part of a tensor on both sides, mapped or fetched; None for a side that cannot be."""
        first, size = info.type.nbytes(start), info.type.nbytes(stop - start)
        if size < self._least_window:
            return [None, None]
        rooms = self._buffers(size)[:, :size]
        found = [side.window(info.name, first, rooms[n], self._limits.mapped) for n, side in enumerate(sides)]
        # Compiled code assumes aligned elements.
        return [w if w is None or w.ctypes.data % max(1, info.type.bits // 8) == 0 else None for w in found]

    def _read(
        self,
        sides: Sequence[WeightReader],
        info: TensorInfo,
        origin: int,
        piece: TensorPiece,
        windows: Sequence[RawBytes | None],
    ) -> list[RawBytes]:
        """The bytes of a piece on both sides. The windows start at element ``origin``."""
        start, size = info.type.nbytes(piece.start), info.type.nbytes(piece.stop - piece.start)
        skipped = start - info.type.nbytes(origin)
        read = []
        for side, weights in enumerate(sides):
            window = windows[side]
            if window is None:
                part = self._buffers(size)[side, :size]
                weights.read_into(info.name, start, part.data)
            else:
                part = window[skipped : skipped + size]
            read.append(part)
        return read

    def _buffers(self, size: int) -> RawBytes:
        """Two buffers of this thread, each of at least ``size`` bytes."""
        buffers: RawBytes | None = getattr(self._local, "buffers", None)
        if buffers is None or buffers.shape[1] < size:
            buffers = self._local.buffers = np.empty((2, size + -size % 64), np.uint8)  # aligned
        return buffers


class _Collector:
    """Adds up the sums of one tensor, piece by piece."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._count = 1 if job.layout is None else job.layout.count
        self._refined: list[tuple[Int64Array, Exact]] = []
        self._all_refined = True
        self._sums: Float64Array = np.empty((3, 0))
        self._changed: Int64Array = np.empty(0, np.int64)

    def add(self, result: PartialSums) -> None:
        self._all_refined = self._all_refined and result.all_refined
        if result.refined is not None:
            self._refined.append(result.refined)
        if not self._changed.size:
            self._sums, self._changed = np.zeros((3, self._count)), np.zeros(self._count, np.int64)
        with np.errstate(all="ignore"):  # NaN, Inf and overflow are handled in `finish`
            if result.index is None:
                here = slice(result.first, result.first + len(result.changed))
                self._sums[:, here] += result.sums
                self._changed[here] += result.changed
            else:
                for row, values in zip(self._sums, result.sums, strict=True):
                    np.add.at(row, result.index, values)
                np.add.at(self._changed, result.index, result.changed)

    def finish(self, base: RowReader, tuned: RowReader, limits: Limits) -> TensorResult:
        if self._job.layout is None:
            (aa, dd), changed = self._sums[:2, 0], int(self._changed[0])
            return TensorResult([self._job], None, float(aa), float(dd), changed)
        sums = Sums(self._sums, self._changed)
        for index, values in self._refined:
            sums.refine(index, values)
        if not self._all_refined:
            self._refine(sums, base, tuned, limits)
        good = sums.finite
        with np.errstate(over="ignore"):
            totals = sums.aa[good].sum(), sums.dd[good].sum()
        return TensorResult([self._job], sums, float(totals[0]), float(totals[1]), int(sums.changed.sum()))

    def _refine(self, sums: Sums, base: RowReader, tuned: RowReader, limits: Limits) -> None:
        """Read the vectors whose sums are doubtful again, whole, and refine their sums."""
        info, layout = self._job.info, self._job.layout
        if self._job.codes is not None:  # refined are the numbers
            info = base.tensors[info.name]
        assert layout is not None  # only neurons are refined
        doubtful = sums.doubtful(info.dtype)
        if not len(doubtful):
            return

        def refined(block: tuple[int, int]) -> Exact:
            some = doubtful[slice(*block)]
            a, b = (gather(side, info, layout, some) for side in (base, tuned))
            return exact(info.dtype, a, b)

        workers = limits.workers(block_memory([layout]))
        for block, values in in_order(refined, blocks(info, layout, len(doubtful)), workers):
            sums.refine(doubtful[slice(*block)], values)


def spans(base: WeightReader, tuned: WeightReader, jobs: Sequence[Job], nbytes: int) -> Iterator[range]:
    """Cut ``jobs`` into runs of neighbours in the files of both sides, of at most ``nbytes`` of each.

    Tensors that are large, are not scored, or do not lie in a file as they are read are alone.
    """
    sizes = [job.info.nbytes for job in jobs]
    names = [job.info.name if _scored(job, nbytes) else None for job in jobs]
    sides = ([-1 if name is None else side.address(name) for name in names] for side in (base, tuned))
    return neighbours(sizes, sides, nbytes)


def _scored(job: Job, most: int) -> bool:
    """Whether it has neurons of several elements, and is small."""
    small = 0 < job.info.nbytes * _LEAST_MEMBERS <= most
    return small and job.layout is not None and job.layout.width > 1 and job.info.dtype in FORMATS


def stacks(jobs: Sequence[Job], sides: Sequence[RawBytes]) -> Iterator[tuple[list[Job], Job, list[RawBytes]]]:
    """The stacks of a span, whose bytes are ``sides``: the members of each, itself, and its bytes."""
    found: dict[tuple[object, ...], list[tuple[Job, int]]] = {}
    for job, start in zip(jobs, accumulate((job.info.nbytes for job in jobs), initial=0), strict=False):
        axes = job.layout.axes if job.layout is not None else None
        found.setdefault((job.info.dtype, job.info.shape, axes), []).append((job, start))
    for several in found.values():
        members, starts = [job for job, _ in several], [start for _, start in several]
        info, layout = members[0].info, members[0].layout
        assert layout is not None  # spans have only such
        axes = (0, *(axis + 1 for axis in layout.axes))
        stack = TensorInfo(info.name, info.dtype, (len(members), *info.shape))
        raw = [np.lib.stride_tricks.sliding_window_view(side, info.nbytes)[starts] for side in sides]
        yield members, Job(stack, Layout.of(stack.shape, axes)), [part.reshape(-1) for part in raw]
