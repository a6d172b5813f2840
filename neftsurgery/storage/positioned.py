"""Files open for positioned reads and writes: all of the bytes asked for, or an error."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, MachineError, UsageError, naming
from ..sources.remote import remote_file

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


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


def consecutive_runs(index: NDArray[np.integer]) -> Iterator[tuple[int, int, int]]:
    """Maximal runs of ascending ``index``: ``(first, last, number)``, with ``index[first] == number``."""
    index = np.asarray(index, np.int64)
    if len(index) and index[-1] - index[0] == len(index) - 1:  # one run, as in thousands of small tensors
        return iter([(0, len(index), int(index[0]))])
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


class OpenFile:
    """A file open for reading, closed with its last reference; Python's own file objects warn of that."""

    def __init__(self, fd: int, path: str | os.PathLike[str] | None = None) -> None:
        self._fd = fd
        self.path = path
        #: The file behind a URL whose bytes are read, if this one only stands in for it.
        self.remote = remote_file(fd)

    @classmethod
    def at(cls, path: str | os.PathLike[str], flags: int = 0) -> OpenFile:
        """Open the file at ``path``."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), path)

    def fileno(self) -> int:
        """The descriptor; a closed file raises a ``ValueError``."""
        if self._fd < 0:
            raise ValueError("the file is closed")
        if self.remote is not None:  # it holds nothing but a header
            hint = "fetch it, and name the local file"
            raise UsageError("this needs the whole file, which is behind a URL", file=self.path, hint=hint)
        return self._fd

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from byte ``offset``, as `read_exactly`. Thread-safe."""
        if self.remote is None:
            read_exactly(self.fileno(), buffer, offset, self.path)
        else:
            self.remote.fill([(offset, buffer.cast("B"))])

    def read_rows(self, offset: int, rows: NDArray[np.integer], out: NDArray[np.uint8]) -> None:
        """Fill ``out``, ``[k, bytes of a row]``, with ascending rows of a table at ``offset``."""
        row, buffer, runs = out.shape[1], out.data.cast("B"), consecutive_runs(rows)
        parts = ((offset + number * row, buffer[first * row : last * row]) for first, last, number in runs)
        if self.remote is not None:
            self.remote.fill(parts)
            return
        fd = self.fileno()
        with naming(self.path):
            for position, part in parts:
                # One bare call, as there may be thousands; the loop reads only the rest.
                got = os.preadv(fd, (part,), position)
                if got < len(part):
                    read_exactly(fd, part[got:], position + got, self.path)

    def status(self) -> os.stat_result:
        """Size, time and identity."""
        with naming(self.path):
            return os.fstat(self._fd)

    def close(self) -> None:
        """Close the file, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # ``close`` is bound early: at interpreter exit, modules may be gone before their objects.
        if self._fd >= 0:
            close(self._fd)


def open_to_change(path: Path, *, below: Path) -> int:
    """Open a regular file for reading and writing: never through a symlink, nor one with other hard links.

    Every component of ``path`` after ``below`` is opened by itself, and the link count is that of the open
    file: links that appear meanwhile are not followed either. A `UsageError` says what is in the way.
    """
    *folders, name = path.relative_to(below).parts
    fd = os.open(below, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    reached = below
    try:
        for folder in folders:
            reached = reached / folder
            fd = _step(folder, _FOLDER, fd, reached)
        fd = _step(name, _FILE, fd, path)
        with naming(path):
            status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError("not a regular file: it cannot be changed in place", file=path)
        if status.st_nlink > 1:
            raise UsageError(
                "a file with several hard links cannot be changed in place: all of them would change",
                file=path,
                hint="write a new checkpoint with [[out=...]], or copy the file first",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _step(name: str, flags: int, folder: int, path: Path) -> int:
    """Open ``name`` in the open ``folder``, which is closed; on an error it stays open."""
    try:
        fd = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and path.is_symlink():
            raise UsageError(
                "a symlink cannot be changed in place: its target may be shared",
                file=path,
                hint="write a new checkpoint with [[out=...]], or name the real file",
            ) from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(folder)
    return fd
