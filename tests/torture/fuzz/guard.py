"""Watches from inside the interpreter for what a reader of hostile files must never do."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Guard", "Violation", "limit_memory"]

#: Running code, or something that could: none of it has a place in reading a file.
_CODE = (
    "compile", "exec", "import", "code.__new__", "pickle.", "marshal.", "ctypes.dlopen", "ctypes.dlsym",
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "socket.", "urllib.",
    "shelve.", "ftplib.", "http.",
)  # fmt: skip
_PATHS = ("open", "os.listdir", "os.scandir", "os.chdir", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
          "os.truncate", "os.chmod", "os.link", "os.symlink", "shutil.rmtree", "shutil.copyfile")  # fmt: skip
SECONDS = 5.0


class Violation(AssertionError):
    """A promise was broken."""


class Guard:
    """An audit hook that is on within `watching`, a limit of memory, and a limit of processor time.

    An audit hook cannot be taken off, so a guard is for processes of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.fspath(folder.resolve())
        self._on = self._learning = False
        self._own: set[Any] = set()
        self._compiled = False
        self.broken: list[str] = []
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._too_long)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._learning and event == "compile":
            self._own.add(arguments[0])
        if not self._on:
            return
        # Type hints are compiled when somebody looks at them: the same ones for every file.
        if event == "compile" and arguments[0] in self._own:
            self._compiled = True
            return
        if event == "exec" and self._compiled:
            self._compiled = False
            return
        if event in _PATHS:
            two = event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile")
            for argument in arguments[: 1 + two]:
                if isinstance(argument, (str, bytes)) and not self._inside(argument):
                    self._note(f"{event} of {argument!r}")
        elif event.startswith(_CODE) and not _is_rename(event, arguments):
            self._note(f"{event} {str(arguments)[:200]}")

    def _inside(self, path: str | bytes) -> bool:
        text = os.path.abspath(os.fsdecode(path))  # which resolves "..", and opens nothing
        return (text + "/").startswith(self._folder + "/")

    def _note(self, what: str) -> None:
        self.broken.append(what)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Allows compilation while valid files are read: that code is the package's own."""
        self._learning = True
        try:
            yield
        finally:
            self._learning = False

    def _too_long(self, number: int, frame: FrameType | None) -> None:
        raise Violation(f"it takes more than {SECONDS:g} s of processor time")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one input. Raises `Violation` if a promise is broken."""
        self._on = True
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._on = False
        if self.broken:
            broken, self.broken = self.broken, []
            raise Violation("; ".join(broken))


def _is_rename(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is the call of the C library that puts an output into its place."""
    if event == "ctypes.dlopen":
        return arguments[0] is None
    return event == "ctypes.dlsym" and arguments[1] in ("renameat2", "renamex_np")


def limit_memory(nbytes: int) -> None:
    """Allow ``nbytes`` more address space from now on; a larger allocation raises ``MemoryError``."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
