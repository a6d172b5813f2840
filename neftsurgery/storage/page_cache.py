"""Files in the page cache: mapped where they lie in memory, instead of copied.

A read copies, and a copy from the page cache takes almost as long as scoring. Mapped pages that are not
cached are read by page faults, at a fraction of the disk's speed. So a range is mapped only if samples of it
can be read without waiting. A wrong guess costs only time.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .positioned import most_descriptors
from .truncated_maps import register

__all__ = ["is_cached", "map_cached"]

_SAMPLE_STEP = 2 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_EINVAL = 22


def map_cached(fd: int, start: int, size: int) -> NDArray[np.uint8] | None:
    """Bytes ``[start, start + size)`` of a file, mapped from the page cache; None if they may not be cached.

    Do not write to the array. The mapping lives as long as its last view. Also None if the file is too short,
    or if the system cannot tell: not on Linux, and on most network file systems, whose mappings can fail
    later.
    """
    if size == 0 or not is_cached(fd, start, size):
        return None
    skipped = start % mmap.ALLOCATIONGRANULARITY
    length = skipped + size
    try:
        if _free_descriptor(fd) > most_descriptors() // 2:  # a mapping has one, and others need some
            return None
        # Writable only because the kernels are compiled for writable arrays; private, so that even a
        # stray write would not reach the file.
        mapping = mmap.mmap(
            fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start - skipped
        )
    except (OSError, ValueError):  # no address space or descriptor left; the file became shorter
        return None
    pages = np.frombuffer(mapping, np.uint8)
    # Fills all page tables in one call, and fails without a signal if the file was truncated.
    if _madvise()(pages.ctypes.data, length, _POPULATE_READ) and ctypes.get_errno() != _EINVAL:
        return None
    register(pages)
    return pages[skipped:]


def _free_descriptor(fd: int) -> int:
    """The lowest free descriptor, which is about how many are in use."""
    free = os.dup(fd)
    os.close(free)
    return free


def is_cached(fd: int, start: int, size: int) -> bool:
    """Whether samples of a range can be read without waiting for a disk; False if the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT") or sys.platform != "linux":
        return False
    byte = bytearray(1)
    try:
        for position in (*range(start, start + size, _SAMPLE_STEP), start + size - 1):
            if os.preadv(fd, [byte], position, os.RWF_NOWAIT) != 1:
                return False
    except OSError:  # the read would have to wait, or the file system cannot tell
        return False
    return True


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    # mmap.madvise would keep the GIL while the system works.
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
