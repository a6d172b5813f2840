"""Work done by an executor of the user's, whose workers may be other processes or machines.

Descriptions of pieces are sent, and small results come back. Each worker opens once what the pieces are of:
it must see the same files under the same names.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, TypeAlias

from ..errors import MachineError, MismatchError, NeftError, UsageError
from ..version import install_command

#: Files as a process sees them, each with its name, bytes, and time of the last change or version; and more.
Seen: TypeAlias = tuple[tuple[object, ...], ...]
#: Opens files again, and gives what does the work on an item, and the files.
Reopen: TypeAlias = Callable[[], tuple[Callable[[Any], Any], Seen]]
#: An executor, what it calls on a lot of items, how many bytes are a lot, and how many lots are under way.
Dispatch: TypeAlias = tuple[Executor, Callable[[Sequence[Any]], Any], int, int]

_lock = threading.Lock()
_opened: dict[str, Callable[[Any], Any]] = {}  # what does the work, the last two


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
