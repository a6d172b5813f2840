"""Work in threads, results in order: how everything that streams is run."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..errors import UsageError

__all__ = ["default_threads", "in_order"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads() -> int:
    """Threads that keep reads in flight while the processors work: two a processor, two to sixteen."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(16, 2 * available))


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int | None = None,
    *,
    stop: threading.Event | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Run ``work`` on each item in threads; yields items with results, in order, few ahead.

    The outcome does not depend on the number of threads. An exception of ``work`` is raised here,
    in its place in the order; work that has not begun is dropped,
    and ``stop`` is set for work that has.

    Raises
    ------
    UsageError
        If ``threads`` is below 1.
    """
    threads = default_threads() if threads is None else threads
    if threads < 1:
        raise UsageError("--threads must be at least 1", found=threads)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="neft")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * threads:
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
