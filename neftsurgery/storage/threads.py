"""Streamed work in threads, with results in order, and its limits of threads and memory.

An executor of the user's may do it instead, whose workers are other processes or machines. Descriptions of
pieces are sent, and small results come back. Each worker opens once what the pieces are of: it must see the
same files under the same names.
"""

from __future__ import annotations

import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias, TypeVar

from ..errors import MachineError, MismatchError, NeftError, UsageError
from ..version import install_command

#: Bytes of buffers and mappings; the interpreter and libraries need some 130 MB more.
DEFAULT_MEMORY = 176 << 20
_LEAST_MEMORY = 16 << 20
_LOT_BYTES = 4 << 20
# What is sent to an executor at once: a share of all bytes. Results have about a 64th of its bytes.
_SHARE, _LARGEST_LOT, _RESULT_SHARE, _MOST_AHEAD = 128, 512 << 20, 64, 256

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Files as a process sees them, each with its name, bytes, and time of the last change or version; and more.
Seen: TypeAlias = tuple[tuple[object, ...], ...]
#: Opens files again, and gives what does the work on an item, and the files.
Reopen: TypeAlias = Callable[[], tuple[Callable[[Any], Any], Seen]]
#: An executor, what it calls on a lot of items, how many bytes are a lot, and how many lots are under way.
Dispatch: TypeAlias = tuple[Executor, Callable[[Sequence[Any]], Any], int, int]

_lock = threading.Lock()
_opened: dict[str, Callable[[Any], Any]] = {}  # what does the work, the last two


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
    #: Whose workers take over what can be sent; None: threads do all.
    executor: Executor | None = None

    @classmethod
    def of(cls, threads: int | None = None, memory: int | None = None, *, mapped: bool = False) -> Limits:
        """By default two threads per core, so that reads are in flight while cores compute, and 176 MiB."""
        if threads is not None and threads < 1:
            raise UsageError("[[threads]] must be at least 1", found=threads)
        if memory is not None and memory < _LEAST_MEMORY:
            raise UsageError("[[memory]] must be at least 16 MiB", found=f"{memory} bytes")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(threads or max(2, min(16, 2 * cores)), memory or DEFAULT_MEMORY, mapped)

    def workers(self, nbytes: int) -> int:
        """Threads that may work at once if each holds ``nbytes``."""
        return max(1, min(self.threads, self.memory // max(1, nbytes)))

    def dispatch(self, reopen: Reopen, seen: Seen, nbytes: int) -> Dispatch | None:
        """How the executor, if any, does work on ``nbytes``; ``seen``: the files that ``reopen`` opens."""
        if self.executor is None:
            return None
        lot = min(max(nbytes // _SHARE, _LOT_BYTES), _LARGEST_LOT)
        ahead = min(max(self.memory * _RESULT_SHARE // lot, 8), _MOST_AHEAD)
        return self.executor, partial(work_there, reopen, seen), lot, ahead


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    stop: threading.Event | None = None,
    nbytes: Callable[[Item], int] = lambda item: _LOT_BYTES,
    dispatch: Dispatch | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Run ``work`` on items in ``workers`` threads, a few ahead; yields items with results, in order.

    A thread takes several items of few ``nbytes`` at once. An exception of ``work`` is raised in its place.
    Then ``stop`` is set, and items that have not begun are dropped. With ``dispatch``, an executor works.
    """
    waiting: deque[tuple[list[Item], Future[Any]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="neft")
    here: Dispatch = pool, lambda lot: [work(item) for item in lot], _LOT_BYTES, 2 * workers
    executor, send, lot_bytes, ahead = dispatch or here

    def first() -> Iterator[tuple[Item, Result]]:
        lot, future = waiting.popleft()
        if isinstance(found := future.result(), NeftError):
            raise found
        return zip(lot, found, strict=True)

    try:
        with executor_errors() if dispatch else nullcontext():
            for lot in lots(items, nbytes, lot_bytes):
                waiting.append((lot, executor.submit(send, lot)))
                if len(waiting) > ahead:
                    yield from first()
            while waiting:
                yield from first()
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        for _, future in waiting:
            future.cancel()
        pool.shutdown(wait=True, cancel_futures=True)


def lots(
    items: Iterable[Item], nbytes: Callable[[Item], int], most: int, count: int | None = None
) -> Iterator[list[Item]]:
    """Items that follow each other: at most ``count``, and of at most ``most`` bytes if they are several."""
    lot, size = list[Item](), 0
    for item in items:
        size += nbytes(item)
        if lot and (size > most or len(lot) == count):
            yield lot
            lot, size = [], nbytes(item)
        lot.append(item)
    if lot:
        yield lot


def work_there(reopen: Reopen, seen: Seen, lot: Sequence[Any]) -> list[Any] | NeftError:
    """Do the work, in the worker. Errors that no other try would mend are returned."""
    try:
        with _lock:
            work = _open(reopen, seen)
        return [work(item) for item in lot]
    except MachineError:
        raise
    except NeftError as error:
        return error


def _open(reopen: Reopen, seen: Seen) -> Callable[[Any], Any]:
    if (key := repr((reopen, seen))) in _opened:
        return _opened[key]
    worker, hint = f"the worker {platform.node()}", "all workers need the same files, packages and processors"
    try:
        work, found = reopen()
    except NeftError as error:
        raise MismatchError(f"{worker} cannot open the same files: {error}", hint=hint) from error
    for one, other in zip_longest(seen, found):
        if one != other:
            raise MismatchError(f"{worker} is not alike", expected=one, found=other, hint=hint)
    for old in list(_opened)[:-1]:
        del _opened[old]
    _opened[key] = work
    return work


@contextmanager
def executor_errors() -> Iterator[None]:
    """Turn what executors raise into a `MachineError`."""
    try:
        yield
    except (NeftError, OSError):
        raise
    except Exception as error:  # each executor has its own
        said = f"the executor failed: {type(error).__name__}: {error}"
        raise MachineError(said, hint="see the logs of its workers") from error


@contextmanager
def dask_executor(address: str | None) -> Iterator[Executor | None]:
    """The workers of a Dask scheduler, by its address or scheduler file, as an executor; None for None."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        hint = install_command("cluster")
        raise UsageError("[[executor]] needs distributed, which is not installed", hint=hint) from error
    where = {"scheduler_file": address} if os.path.isfile(address) else {"address": address}
    try:
        client = Client(**where, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:  # a TimeoutError among them
        hint = "start one with `dask scheduler`; name its tcp:// address or its scheduler file"
        raise MachineError("no Dask scheduler answers", file=address, hint=hint) from error
    with client:
        yield client.get_executor(retries=2)
