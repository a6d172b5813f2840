"""Copies of whole files, made by the kernel if it can: blocks are shared, holes kept.

A checkpoint of many gigabytes is copied before a few of its bytes are rewritten, so data goes
through user space only if it must.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MismatchError, UsageError, naming
from .output import begin_writeback
from .positioned import OpenFile, write_exactly

__all__ = ["copy_file"]

_STEP = 32 << 20  # small enough for a progress bar and for Ctrl-C, too large to cost anything
_FICLONE = 0x40049409  # _IOW(0x94, 9, int); the fcntl module has it from Python 3.13


def copy_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | int,
    *,
    progress: Callable[[int], None] | None = None,
    step: int = _STEP,
) -> int:
    """Copy a regular file byte for byte; holes stay holes, blocks are shared if possible.

    Returns the permission bits of ``source`` (no set-id or sticky bits). Links to it are followed. Raises a
    `UsageError` if it is not a regular file, and a `MismatchError` if it changed while it was being copied.

    Parameters
    ----------
    target:
        A path where nothing is: the file is created, gets the permission bits of ``source`` at the end, and
        is removed if the copy fails. Or the descriptor of an empty file, open for writing, whose permission
        bits are left to the caller.
    progress:
        Called with the number of bytes copied since its last call. What it raises ends the copy.
    step:
        Bytes that the kernel copies at once; through a buffer it is an eighth of them.
    """
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    reader = OpenFile.at(source, os.O_NONBLOCK)
    try:
        before = reader.status()
        if not stat.S_ISREG(before.st_mode):
            raise UsageError("not a regular file", file=source)
        mode = stat.S_IMODE(before.st_mode) & 0o777
        if isinstance(target, int):
            if os.fstat(target).st_size:
                raise ValueError("the target of a copy must be empty")
            _copy_content(reader, target, before, progress, step)
        else:
            _copy_to_path(reader, Path(target), before, mode, progress, step)
        return mode
    except MismatchError as error:
        error.file = error.file or str(source)
        raise
    finally:
        reader.close()


def _copy_to_path(
    reader: OpenFile,
    target: Path,
    before: os.stat_result,
    mode: int,
    progress: Callable[[int], None] | None,
    step: int,
) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    writer = os.open(target, flags, 0o600)
    try:
        with naming(target):
            _copy_content(reader, writer, before, progress, step)
            os.fchmod(writer, mode)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(target)
        raise
    finally:
        os.close(writer)


def _copy_content(
    reader: OpenFile, writer: int, before: os.stat_result, progress: Callable[[int], None] | None, step: int
) -> None:
    advance = progress or (lambda nbytes: None)
    if _clone(reader, writer):
        advance(before.st_size)
    else:
        os.ftruncate(writer, before.st_size)
        done, by_kernel = 0, True
        for start, stop in _data_ranges(reader, before):
            if start > done:
                advance(start - done)
            by_kernel = _copy_range(reader, writer, start, stop, advance, by_kernel, step)
            done = stop
        if before.st_size > done:
            advance(before.st_size - done)
    after = reader.status()
    if after.st_size != before.st_size:
        raise _changed(expected=f"{before.st_size} bytes", found=after.st_size)
    if after.st_mtime_ns != before.st_mtime_ns:
        raise _changed()
    if os.pread(reader.fileno(), 1, before.st_size):  # as in /proc, where files seem to be empty
        raise _changed(expected=f"{before.st_size} bytes", found="more")
    if (size := os.fstat(writer).st_size) != before.st_size:
        raise OSError(errno.EIO, f"the copy has {size} bytes instead of {before.st_size}")


def _changed(**sides: Any) -> MismatchError:
    hint = "wait until nothing writes to it, then run the command again"
    return MismatchError("the file changed while it was being copied", hint=hint, **sides)


def _clone(reader: OpenFile, writer: int) -> bool:
    """Share all blocks of one file with another; false where the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(writer, _FICLONE, reader.fileno())
    except OSError:  # a real failure (disk full) stops the copy that follows
        return False
    return True


def _data_ranges(reader: OpenFile, status: os.stat_result) -> Iterator[tuple[int, int]]:
    """The parts ``[start, stop)`` of a file that are not holes, ascending."""
    size = status.st_size
    if not hasattr(os, "SEEK_DATA") or status.st_blocks * 512 >= size:
        yield 0, size
        return
    position = 0
    while position < size:
        try:
            start = os.lseek(reader.fileno(), position, os.SEEK_DATA)
            stop = min(os.lseek(reader.fileno(), start, os.SEEK_HOLE), size)
            if stop <= start:  # a hole that was made just now, or a file system that is wrong
                stop = size
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            start, stop = position, size
        if start >= size:
            return
        yield start, stop
        position = stop


def _copy_range(
    reader: OpenFile,
    writer: int,
    start: int,
    stop: int,
    advance: Callable[[int], None],
    by_kernel: bool,
    step: int,
) -> bool:
    """Copy bytes ``[start, stop)``, or raise; returns whether it is worth asking the kernel again."""
    while start < stop:
        copied = _kernel_step(reader, writer, start, min(step, stop - start)) if by_kernel else 0
        if not copied:
            # Some kernels return 0 before the end: a plain read decides.
            by_kernel = False
            copied = _user_step(reader, writer, start, min(max(1, step // 8), stop - start))
        if not copied:
            raise _changed(expected=f"{stop} bytes", found=start)
        begin_writeback(writer, start, copied)
        start += copied
        advance(copied)
    return by_kernel


def _kernel_step(reader: OpenFile, writer: int, position: int, count: int) -> int:
    """Bytes copied by the kernel; 0 if it cannot copy between these files."""
    if sys.platform != "linux" or not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(reader.fileno(), writer, count, position, position)
    except (
        OSError
    ):  # not between these files, not on this system, or a real failure, which a write meets again
        return 0


def _user_step(reader: OpenFile, writer: int, position: int, count: int) -> int:
    """Bytes copied through a buffer; 0 at the end of the file."""
    with naming(reader.path):
        data = os.pread(reader.fileno(), count, position)
    write_exactly(writer, data, position)
    return len(data)
