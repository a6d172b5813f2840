"""One JSON file a type, each made in a child process with a time limit; what is there already is kept."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers

__all__ = ["in_children"]

_SECONDS = 300


def in_children(
    work: Callable[[str], Any],
    names: Iterable[str],
    folder: Path,
    *,
    warm_up: str = "llama",
    jobs: int = 1,
    seconds: int = _SECONDS,
) -> None:
    """Store the result of ``work`` for each name in ``folder``, unless it is there; of a failure, why.

    ``warm_up`` is worked on first in this process: that imports what every child needs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(name, path) for name in names if not (path := folder / f"{name}.json").exists()]
    if not missing:
        return
    with _quiet():
        work(warm_up)
    gc.freeze()
    running: dict[int, tuple[str, Path, float]] = {}
    while missing or running:
        if missing and len(running) < jobs:
            name, path = missing.pop(0)
            child = os.fork()
            if child == 0:
                _in_child(work, name, path, seconds)
            running[child] = (name, path, time.monotonic())
            continue
        child, status = os.wait()
        name, path, started = running.pop(child)
        if not path.exists():
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            why = f"took more than {seconds} s" if late else f"ended with {status}"
            path.write_text(json.dumps({"failed": why}))
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity(50)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _in_child(work: Callable[[str], Any], name: str, path: Path, seconds: int) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: other work does not count
    signal.alarm(10 * seconds)
    try:
        with _quiet():
            try:
                found = work(name)
            except Exception as error:
                told = str(error).strip() or type(error).__name__
                found = {"failed": f"{type(error).__name__}: {told}".splitlines()[0][:200]}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(found))
        partial.rename(path)
    finally:
        os._exit(0)
