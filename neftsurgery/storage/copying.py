"""Copies of whole files, made by the kernel if it can: data goes through user space only if it must."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MismatchError, UsageError, naming
from .output import begin_writeback
from .positioned import OpenFile, write_exactly

_STEP = 32 << 20  # small enough for a progress bar and for Ctrl-C, too large to cost anything


def copy_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | int,
    *,
    progress: Callable[[int], None] = lambda nbytes: None,
    step: int = _STEP,
) -> int:
    """Copy a regular file byte for byte; holes stay holes, blocks are shared if possible.

    ``target`` is a path where nothing is, or the descriptor of an empty file. A new file gets the permission
    bits of ``source`` (no set-id or sticky bits), which are returned, and is removed if the copy fails. A
    `UsageError` says that ``source`` is not a regular file, a `MismatchError` that it changed meanwhile.
    """
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    with closing(OpenFile.at(source, os.O_NONBLOCK)) as reader:
        before = reader.status()
        if not stat.S_ISREG(before.st_mode):
            raise UsageError("not a regular file", file=source)
        mode = stat.S_IMODE(before.st_mode) & 0o777
        if isinstance(target, int):
            if os.fstat(target).st_size:
                raise ValueError("the target of a copy must be empty")
            FileCopy(reader, target, before, progress, step).run()
        else:
            with naming(target), _created(Path(target), mode) as writer:
                FileCopy(reader, writer, before, progress, step).run()
        return mode


@contextmanager
def _created(path: Path, mode: int) -> Iterator[int]:
    """A new file, open for writing, which is removed if the context fails."""
    writer = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield writer
        os.fchmod(writer, mode)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise
    finally:
        os.close(writer)


@dataclass(frozen=True, slots=True)
class FileCopy:
    """A copy of one open file to another."""

    reader: OpenFile
    writer: int
    before: os.stat_result  # of the reader
    advance: Callable[[int], None] = lambda nbytes: None
    step: int = _STEP

    def run(self) -> None:
        """Copy all of it, and check that it did not change."""
        before = self.before
        os.ftruncate(self.writer, before.st_size)
        done, by_kernel = 0, True
        for start, stop in _data_ranges(self.reader, before):
            if start > done:
                self.advance(start - done)
            by_kernel = self._copy_range(start, stop, by_kernel)
            done = stop
        if before.st_size > done:
            self.advance(before.st_size - done)
        after = self.reader.status()
        if after.st_size != before.st_size:
            raise self._changed(expected=f"{before.st_size} bytes", found=after.st_size)
        if after.st_mtime_ns != before.st_mtime_ns:
            raise self._changed()
        if os.pread(self.reader.fileno(), 1, before.st_size):  # as in /proc, where files seem to be empty
            raise self._changed(expected=f"{before.st_size} bytes", found="more")
        if (size := os.fstat(self.writer).st_size) != before.st_size:
            raise OSError(errno.EIO, f"the copy has {size} bytes instead of {before.st_size}")

    def _copy_range(self, start: int, stop: int, by_kernel: bool) -> bool:
        """Copy bytes ``[start, stop)``, or raise; returns whether it is worth asking the kernel again."""
        while start < stop:
            copied = self._by_kernel(start, min(self.step, stop - start)) if by_kernel else 0
            if not copied:
                # Some kernels return 0 before the end: a plain read decides.
                by_kernel = False
                copied = self._by_buffer(start, min(max(1, self.step // 8), stop - start))
            if not copied:
                raise self._changed(expected=f"{stop} bytes", found=start)
            begin_writeback(self.writer, start, copied)
            start += copied
            self.advance(copied)
        return by_kernel

    def _by_kernel(self, position: int, count: int) -> int:
        """Bytes copied by the kernel, which shares blocks if it can; 0 if it cannot copy between them."""
        if sys.platform != "linux" or not hasattr(os, "copy_file_range"):
            return 0
        try:
            return os.copy_file_range(self.reader.fileno(), self.writer, count, position, position)
        except OSError:  # not here, or a real failure, which a write meets again
            return 0

    def _by_buffer(self, position: int, count: int) -> int:
        """Bytes copied through a buffer; 0 at the end of the file."""
        with naming(self.reader.path):
            data = os.pread(self.reader.fileno(), count, position)
        write_exactly(self.writer, data, position)
        return len(data)

    def _changed(self, **sides: Any) -> MismatchError:
        what = "the file changed while it was being copied"
        hint = "wait until nothing writes to it, then run the command again"
        return MismatchError(what, file=self.reader.path, hint=hint, **sides)


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
