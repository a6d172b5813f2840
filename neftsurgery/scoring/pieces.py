"""How the work of scoring is cut: by the shapes of the tensors alone, never by threads or memory.

A tensor is a sequence of *grains*: runs of elements with a sum of their own. Neighbouring grains of one
size form a *piece*, and a *task* is the pieces that a thread takes at once. Sums are added grain by grain
in the order of the tensor, so the result has the same bits however grains are grouped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..neurons.layout import Layout
from ..tensors.header import TensorInfo
from .kernels import FORMATS

__all__ = ["CUT_SIZES", "CutSizes", "Job", "TensorPiece", "joined", "tasks"]

_LEAST_RUNS = 64
_TASK_PIECES = 256  # small tensors share a task


@dataclass(frozen=True, slots=True)
class CutSizes:
    """How finely the work is cut, in bytes of each side. Of these, results depend on ``piece`` alone."""

    piece: int = 2 << 20  # what is read and summed at once: it stays in a core's cache
    least_task: int = 2 << 20  # what a thread takes at once
    largest_task: int = 32 << 20
    least_window: int = 256 << 10  # what is worth mapping: below it, a copy costs less


CUT_SIZES = CutSizes()


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor to compare. Without ``layout`` its change is summed over the whole tensor."""

    info: TensorInfo
    layout: Layout | None

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
    last: bool


def tasks(jobs: Sequence[Job], task_bytes: int, piece_bytes: int) -> Iterator[list[TensorPiece]]:
    """All pieces in order, of about ``piece_bytes`` of each side; several together, up to ``task_bytes``."""
    task: list[TensorPiece] = []
    size = 0
    for number, job in enumerate(jobs):
        for piece in _pieces(number, job, piece_bytes):
            nbytes = job.info.type.nbytes(piece.stop - piece.start)
            if task and (size + nbytes > task_bytes or len(task) >= _TASK_PIECES):
                yield task
                task, size = [], 0
            task.append(piece)
            size += nbytes
    if task:
        yield task


def joined(pieces: Iterable[TensorPiece], job: Job) -> Iterator[TensorPiece]:
    """Neighbouring pieces of one job merged into few large ones, where that changes no sum."""
    # Column sums start again with each piece, and so do the sums of types that are not floats.
    if job.across or job.info.dtype not in FORMATS:
        yield from pieces
        return
    for grain, group in groupby(pieces, key=lambda piece: piece.grain):
        members = list(group)
        yield TensorPiece(members[0].job, members[0].start, members[-1].stop, grain, members[-1].last)


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
            yield TensorPiece(number, start, stop, run, stop == total)
    else:
        for begin in range(0, total, run):
            for start in range(begin, begin + run, limit):
                stop = min(start + limit, begin + run)
                yield TensorPiece(number, start, stop, stop - start, stop == total)
