"""Positioned reads and writes: all of the bytes asked for, or an error."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, naming

__all__ = [
    "OpenFile",
    "changed_file",
    "consecutive_runs",
    "most_descriptors",
    "read_exactly",
    "read_rows_exactly",
    "sha256_of",
    "write_exactly",
]


def read_exactly(fd: int, buffer: memoryview, offset: int, path: str | os.PathLike[str] | None) -> None:
    """Fill ``buffer`` from byte ``offset`` of ``fd``; a file that is too short is a `CorruptFileError`."""
    done = 0
    while done < len(buffer):
        with naming(path):
            got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            raise CorruptFileError(
                "the file ends too soon: it was truncated while it was read",
                file=path,
                expected=f"{len(buffer)} bytes at {offset}",
                found=f"{done}",
            )
        done += got


def read_rows_exactly(
    fd: int,
    offset: int,
    rows: NDArray[np.integer],
    out: NDArray[np.uint8],
    path: str | os.PathLike[str] | None,
) -> None:
    """Fill ``out``, ``[k, bytes of a row]``, with rows ``rows`` (ascending) of a table at ``offset``."""
    row = out.shape[1]
    buffer = out.data.cast("B")
    with naming(path):
        for first, last, number in consecutive_runs(rows):
            part, position = buffer[first * row : last * row], offset + number * row
            # One bare call, as there may be thousands; the loop reads only the rest.
            got = os.preadv(fd, (part,), position)
            if got < len(part):
                read_exactly(fd, part[got:], position + got, path)


def consecutive_runs(index: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Maximal runs of consecutive numbers in ``index``, ascending.

    Yields ``(first, last, number)``: the run is ``index[first:last]`` and starts with ``number``.
    """
    index = np.asarray(index, np.int64)
    edges = np.flatnonzero(np.diff(index, prepend=-2, append=-2) != 1)
    firsts = edges[:-1]
    return zip(firsts.tolist(), edges[1:].tolist(), index[firsts].tolist(), strict=True)


def write_exactly(fd: int, data: memoryview | bytes | bytearray, offset: int) -> None:
    """Write all of ``data``, C-contiguous, at byte ``offset`` of ``fd``."""
    view, done = memoryview(data), 0
    if view.nbytes:  # an empty view of several dimensions cannot be cast
        view = view.cast("B")
    while done < view.nbytes:
        written = os.pwrite(fd, view[done:], offset + done)
        if not written:  # no file system should: trying again might never end
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += written


def changed_file(path: str | os.PathLike[str]) -> MachineError:
    """The error for a file that is not as it was when it was opened."""
    return MachineError(
        "the file was changed by someone else while it was in use",
        file=path,
        hint="nothing was written; run the command again when nothing else writes to the file",
    )


def most_descriptors() -> int:
    """How many descriptors this process may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of the rest of ``file``, in hex, as ``sha256sum`` shows it."""
    state = hashlib.sha256()
    while block := file.read(8 << 20):
        state.update(block)
    return state.hexdigest()


class OpenFile:
    """A file open for reading, closed with its last reference; Python's own file objects warn of that."""

    def __init__(self, fd: int, path: str | os.PathLike[str] | None = None) -> None:
        self._fd = fd
        self.path = path

    @classmethod
    def at(cls, path: str | os.PathLike[str], flags: int = 0) -> OpenFile:
        """Open the file at ``path``."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), path)

    def fileno(self) -> int:
        """The descriptor; a closed file raises a ``ValueError``."""
        if self._fd < 0:
            raise ValueError("the file is closed")
        return self._fd

    def status(self) -> os.stat_result:
        """Size, time and identity."""
        with naming(self.path):
            return os.fstat(self.fileno())

    def close(self) -> None:
        """Close the file, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # ``close`` is bound early: at interpreter exit, modules may be gone before their objects.
        if self._fd >= 0:
            close(self._fd)
