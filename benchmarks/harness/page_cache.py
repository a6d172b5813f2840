"""The page cache: loads files into it, drops them from it, and checks both."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

WINDOW = 1 << 30
CHUNK = 1 << 20
WARM, COLD = 0.999, 0.001  # a stray page does not matter


class PageCacheError(Exception):
    """The system does not keep file pages in memory, or does not drop them, as the measurement needs."""


def files_of(*folders: Path) -> list[Path]:
    """All files under ``folders``."""
    return sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())


def warm(*folders: Path) -> None:
    """Reads what is not in memory yet. Raises PageCacheError if it does not stay there."""
    for attempt in range(4):  # the kernel may evict pages read once before older ones that were read twice
        if resident_share(*folders) >= WARM:
            return
        if attempt == 1:
            _drop_all()
        buffer = bytearray(CHUNK)
        for file in files_of(*folders):
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    share = resident_share(*folders)
    if share < WARM:
        raise PageCacheError(f"only {share:.1%} of the files stay in the page cache: too little free memory")


def drop(*folders: Path) -> None:
    """Drops the files from memory, by root's means if others do not suffice. Raises PageCacheError."""
    for file in files_of(*folders):
        with _opened(file) as fd:
            os.fsync(fd)  # a dirty page cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_share(*folders) > COLD:
        _drop_all()
    share = resident_share(*folders)
    if share > COLD:
        raise PageCacheError(f"{share:.1%} of the files stay in the page cache: they could not be dropped")


def _drop_all() -> None:
    """Empties the page cache, if this process may."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def resident_share(*folders: Path) -> float:
    """The share of the files' pages that is in memory, by ``mincore``, which does not touch them."""
    resident = total = 0
    for file in files_of(*folders):
        for window in _windows(file):
            pages = -(-len(window) // mmap.PAGESIZE)
            resident += _resident_pages(window, pages)
            total += pages
    return resident / total if total else 1.0


def _resident_pages(window: mmap.mmap, pages: int) -> int:
    flags = (ctypes.c_ubyte * pages)()
    start = ctypes.c_char.from_buffer(window)
    try:
        if _libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(window)), flags):
            raise PageCacheError(f"mincore: {os.strerror(ctypes.get_errno())}")
    finally:
        del start  # a mapping with an exported pointer cannot be closed
    return pages - bytes(flags).count(0)


def _windows(file: Path) -> Iterator[mmap.mmap]:
    """The file in bounded mappings: writable, as ctypes requires, and private, so that nothing is written."""
    size = file.stat().st_size
    with _opened(file) as fd:
        for offset in range(0, size, WINDOW):
            with mmap.mmap(fd, min(WINDOW, size - offset), access=mmap.ACCESS_COPY, offset=offset) as window:
                yield window


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def free_space(folder: Path) -> int:
    """Free bytes of the file system of ``folder``."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def total_size(folders: Iterable[Path]) -> int:
    """The summed lengths of all files under ``folders``."""
    return sum(file.stat().st_size for file in files_of(*folders))


_libc = ctypes.CDLL(None, use_errno=True)
