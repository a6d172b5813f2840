"""Bytes that are in memory already: mapped where they lie in the page cache, instead of copied.

A plain read copies; from a warm page cache that copy is most of the cost of scoring. A mapping of cold
pages, however, is read by page faults, at a fraction of a disk's speed. So a range is mapped only if
samples of it answer at once; what was wrongly thought warm is only slower.
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

from .truncated_maps import watch

__all__ = ["at_hand", "resident"]

_SAMPLE_STEP = 2 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_EINVAL = 22


def resident(fd: int, start: int, size: int) -> NDArray[np.uint8] | None:
    """Bytes ``[start, start + size)`` of a file as they lie in memory, or None if they may not.

    The array is not to be written to; the mapping ends with its last view. Also None where the file
    ends before, or the system or the file system cannot tell (anything but Linux; most network file
    systems, whose mappings can fail in the middle).
    """
    if size == 0 or not at_hand(fd, start, size):
        return None
    skipped = start % mmap.ALLOCATIONGRANULARITY
    length = skipped + size
    try:
        # Writable in name only, as the kernels are compiled for writable arrays; private, so that not
        # even a stray write would reach the file.
        mapping = mmap.mmap(
            fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start - skipped
        )
    except (OSError, ValueError):  # no address space left; the file became shorter
        return None
    pages = np.frombuffer(mapping, np.uint8)
    # All page tables at once, and an answer instead of a signal if the file was cut short.
    if _madvise()(pages.ctypes.data, length, _POPULATE_READ) and ctypes.get_errno() != _EINVAL:
        return None
    watch(pages)
    return pages[skipped:]


def at_hand(fd: int, start: int, size: int) -> bool:
    """Whether samples of a range can be read without waiting for a disk; False where nobody can tell."""
    if not hasattr(os, "RWF_NOWAIT") or sys.platform != "linux":
        return False
    byte = bytearray(1)
    try:
        for position in (*range(start, start + size, _SAMPLE_STEP), start + size - 1):
            if os.preadv(fd, [byte], position, os.RWF_NOWAIT) != 1:
                return False
    except OSError:  # it would have to wait, or cannot tell
        return False
    return True


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    # Not mmap.madvise, which keeps the GIL while the kernel works.
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
