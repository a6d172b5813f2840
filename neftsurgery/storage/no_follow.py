"""Open a file to change it: never through a symlink, and no file with other hard links."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import UsageError, naming

__all__ = ["open_to_change"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_to_change(path: Path, *, below: Path) -> int:
    """Open the regular file ``path`` for reading and writing.

    Every component of ``path`` after ``below`` is opened by itself and never followed, and the link count is
    that of the open file. So a link that appears meanwhile is not followed either. A `UsageError` says that
    a component is a symlink, or that the file is not a regular one or has several hard links.
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
