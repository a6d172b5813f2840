"""Small tensors in stacks: the same bits as one by one, whatever lies beside what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from test_engine import KINDS, LAYOUTS, Memory, of_all_sorts, shaped
from test_kernels import ALL

from neftsurgery.neurons.layout import Layout
from neftsurgery.scoring.engine import spans, stream
from neftsurgery.scoring.partial_sums import Job
from neftsurgery.storage.threads import Limits
from neftsurgery.tensors.header import TensorInfo


class File(Memory):
    """Tensors one after the other in a file, in order; those of ``elsewhere`` are computed."""

    def __init__(
        self, arrays: Mapping[str, tuple[TensorInfo, bytes]], gap: str = "", elsewhere: str = ""
    ) -> None:
        super().__init__(arrays)
        self.reads: list[tuple[str, int]] = []
        self._elsewhere = elsewhere
        self._data, self._starts = b"", dict[str, int]()
        for name, (_, raw) in arrays.items():
            self._data += b"\0" * (8 if name == gap else 0)
            self._starts[name] = len(self._data)
            self._data += raw

    def address(self, name: str) -> int:
        return -1 if name == self._elsewhere else self._starts[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.reads.append((name, len(buffer)))
        first = self._starts[name] + start
        buffer[:] = self._data[first : first + len(buffer)]


def small_model() -> tuple[list[Job], list[dict[str, tuple[TensorInfo, bytes]]]]:
    """Tensors of all types and layouts, some of each next to each other; some are not scored."""
    jobs: list[Job] = []
    sides: list[dict[str, tuple[TensorInfo, bytes]]] = [{}, {}]
    kinds = itertools.product(ALL, (*LAYOUTS.values(), ((6, 40), (1,)), ((5, 1), (0,)), ((9,), None)))
    for number, (dtype, (shape, axes)) in enumerate(kinds):
        for copy in range(3):
            info = TensorInfo(f"t{number}.{copy}", dtype, shape)
            neurons = 1 if axes is None else math.prod(shape[axis] for axis in axes)
            pair = of_all_sorts(dtype, neurons, info.elements // neurons)
            for side, matrix in zip(sides, pair, strict=True):
                side[info.name] = (info, shaped(matrix, shape, axes or (0,)).tobytes())
            jobs.append(Job(info, None if axes is None else Layout(shape, axes)))
    return jobs, sides


def by_tensor(base: Memory, tuned: Memory, jobs: list[Job], *, stacked: bool) -> dict[str, list[bytes]]:
    """The sums and scores of every neuron, by tensor."""
    found: dict[str, list[bytes]] = {}
    for result in stream(base, tuned, jobs, limits=Limits.of(3), stacked=stacked):
        start = 0
        for job in result.jobs:
            if job.layout is None or result.sums is None:
                found[job.info.name] = [repr((result.base_sq, result.delta_sq, result.changed)).encode()]
                continue
            part, s = slice(start, start + job.layout.count), result.sums
            scores = [s.score(kind, job.layout.width) for kind in KINDS]
            numbers = [s.aa, s.dd, s.ad, s.changed, s.finite, *scores]
            found[job.info.name] = [one[part].tobytes() for one in numbers]
            start += job.layout.count
    return found


def test_stacks_give_the_bits_of_single_tensors() -> None:
    jobs, (base, tuned) = small_model()
    alone = by_tensor(Memory(base), Memory(tuned), jobs, stacked=False)
    assert len(alone) == len(jobs)
    files = File(base, gap="t7.1"), File(tuned, elsewhere="t11.1")
    assert by_tensor(*files, jobs, stacked=True) == alone
    reads = [one for side in files for one in side.reads]
    assert len(reads) < len(jobs)  # many tensors were read at once
    assert max(size for _, size in reads) > max(info.nbytes for info, _ in base.values())


def test_a_span_ends_where_a_tensor_does_not_follow_the_one_before() -> None:
    infos = [TensorInfo(name, "F32", (2, 4)) for name in "abcdefgh"]
    arrays = {info.name: (info, bytes(info.nbytes)) for info in infos}
    jobs = [Job(info, None if info.name == "c" else Layout((2, 4), (0,))) for info in infos]
    base, tuned = File(arrays, gap="f"), File(arrays, elsewhere="g")
    found = ["".join(infos[n].name for n in one) for one in spans(base, tuned, jobs, 1 << 10)]
    assert found == ["ab", "c", "de", "f", "g", "h"]
    assert [len(one) for one in spans(base, base, jobs[3:], 64 * 8)] == [2, 3]
    assert [len(one) for one in spans(base, base, jobs[3:], 64)] == [1] * 5  # too large to share
    assert not list(spans(base, base, [], 64))
