"""Small tensors that lie one after the other in their files: read in one go, and summed many at once.

Of a span of neighbours, those of one dtype, shape and layout make a *stack*: one tensor with an axis more. A
neuron's sums have the same bits in a stack as in its tensor, as both are one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from ..neurons.layout import Layout
from ..tensors.arrays import RawBytes
from ..tensors.header import TensorInfo
from ..tensors.reader import WeightReader, neighbours
from .kernels import FORMATS
from .partial_sums import Job

_LEAST_MEMBERS = 8  # of a span that is as large as may be


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
