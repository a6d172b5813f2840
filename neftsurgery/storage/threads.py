"""Threads for streamed work, with results in order, and its limits of threads and memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..errors import UsageError

#: Bytes of buffers and mappings; the interpreter and libraries need some 130 MB more.
DEFAULT_MEMORY = 176 << 20
_LEAST_MEMORY = 16 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Limits:
    """How many threads and bytes work may use. No result depends on it. Made by `of`."""

    threads: int
    memory: int  # bytes of buffers and of files mapped into memory
    #: Whether files in the page cache may be mapped instead of read. That is faster, and needs a signal
    #: handler (`neftsurgery.storage.page_cache`): only the command line sets it.
    mapped: bool = False
    #: Bytes of vectors handled at once by a thread; None: what suits their layout (`neurons.vectors`).
    block: int | None = None

    @classmethod
    def of(cls, threads: int | None = None, memory: int | None = None, *, mapped: bool = False) -> Limits:
        """By default two threads per core, so that reads are in flight while cores compute, and 176 MiB."""
        if threads is not None and threads < 1:
            raise UsageError("[[threads]] must be at least 1", found=threads)
        if memory is not None and memory < _LEAST_MEMORY:
            raise UsageError("[[memory]] must be at least 16 MiB", found=f"{memory} bytes")
        return cls(threads or _default_threads(), memory or DEFAULT_MEMORY, mapped)

    def workers(self, nbytes: int) -> int:
        """Threads that may work at once if each holds ``nbytes``."""
        return max(1, min(self.threads, self.memory // max(1, nbytes)))


def _default_threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(16, 2 * available))


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    stop: threading.Event | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Run ``work`` on items in ``workers`` threads, a few ahead; yields items with results, in order.

    An exception of ``work`` is raised in its place. Then ``stop`` is set, and items that have not begun are
    dropped.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="neft")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
