"""Standard streams that never stop the work: what cannot be printed is lost, and the command goes on.

A reader may leave (``| head``), a log may be on a full disk, a parent process may have closed the streams.
The files that a command writes are as important as before.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import MachineError

__all__ = ["lossy_streams"]


class _LossyFile(io.FileIO):
    """A file open for writing. The first error is kept, not raised, and nothing is written after it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while self.error is None:
                if (written := super().write(data)) is not None:
                    return written
                select.select((), (self,), ())  # the pipe is full, and the descriptor does not block
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes


@contextmanager
def lossy_streams() -> Iterator[Callable[[], MachineError | None]]:
    """Within the context, printing raises no error, whatever the standard streams are.

    Yields a function that tells what stdout lost; that its reader has left is not a loss. Streams that were
    replaced, as by a test, stay as they are.
    """
    _open_closed_descriptors()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # for as long as the process lives
    raw, sys.stdout = _lossy(sys.stdout, sys.__stdout__)
    _, sys.stderr = _lossy(sys.stderr, sys.__stderr__)

    def lost() -> MachineError | None:
        sys.stdout.flush()
        if raw is None or raw.error is None or raw.error.errno == errno.EPIPE:
            return None
        return MachineError(
            f"{(raw.error.strerror or str(raw.error)).lower()}: what was printed is lost",
            file="standard output",
            hint="the command itself has succeeded",
        )

    try:
        yield lost
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Give the numbers 0 to 2 to the null device where they are free: no output file may get one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number


def _lossy(stream: TextIO | None, original: TextIO | None) -> tuple[_LossyFile | None, Any]:
    """The stream as one that loses what cannot be written; as it is if it is not the process's own."""
    if stream is not None and stream is not original:
        return None, stream
    raw = _LossyFile(os.devnull if stream is None else stream.fileno(), "w", closefd=stream is None)
    encoding = "utf-8" if stream is None else stream.encoding
    return raw, io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
