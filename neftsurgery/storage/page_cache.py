"""Files in the page cache: mapped where they lie in memory, instead of copied.

A read copies, and a copy from the page cache takes almost as long as scoring. Mapped pages that are not
cached are read by page faults, at a fraction of the disk's speed. So a range is mapped only if samples of it
can be read without waiting. A wrong guess costs only time.

Touching mapped pages that the file no longer has raises SIGBUS, which kills a process. Inside `sigbus_guard`,
the pages of a mapping become zeros instead, and `is_truncated` reports it. Any other SIGBUS is handled as
before. The guard installs a signal handler, so only the command line uses it: see `Limits.mapped`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .positioned import most_descriptors

_SAMPLE_STEP = 2 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_EINVAL = 22

_AddressRange = tuple[int, int]
_MAP_FIXED = 0x10  # missing from the mmap module
_SA_SIGINFO = 4
_SI_ADDR_OFFSET = 16  # of si_addr in a siginfo_t, where pointers have 8 bytes
_SUPPORTED = sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8

# Replaced, never changed: the handler may read them at any point of any other code.
_registered: tuple[_AddressRange, ...] = ()
_truncated: tuple[_AddressRange, ...] = ()
_lock = threading.RLock()
_depth = 0


class _SigAction(ctypes.Structure):
    """The C library's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_previous = _SigAction()
_libc: Any = ctypes.PyDLL(None)  # keeps the GIL: a handler must not wait for it
if _SUPPORTED:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)


def map_cached(fd: int, start: int, size: int) -> NDArray[np.uint8] | None:
    """Bytes ``[start, start + size)`` of a file, mapped from the page cache; None if they may not be cached.

    Do not write to the array; its last view ends the mapping. Also None if the file is too short, or the
    system cannot tell: not on Linux, and on most network file systems, whose mappings can fail later.
    """
    if size == 0 or not is_cached(fd, start, size):
        return None
    skipped = start % mmap.ALLOCATIONGRANULARITY
    length = skipped + size
    try:
        free = os.dup(fd)  # the lowest free descriptor, which is about how many are in use
        os.close(free)
        if free > most_descriptors() // 2:  # a mapping has one, and others need some
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
    _register(pages)
    return pages[skipped:]


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


def _register(pages: NDArray[np.uint8]) -> None:
    """Guard a mapping for as long as the array of all its pages lives."""
    global _registered
    own = (pages.ctypes.data, pages.ctypes.data + pages.nbytes)
    with _lock:
        _registered = (*_registered, own)
    weakref.finalize(pages, _forget, own).atexit = False


def _forget(own: _AddressRange) -> None:
    global _registered, _truncated
    with _lock:
        _registered = tuple(one for one in _registered if one != own)
        _truncated = tuple(one for one in _truncated if one != own)


def is_truncated(part: NDArray[np.uint8]) -> bool:
    """Whether the mapping that holds ``part`` was touched where its file had already ended."""
    return any(start <= part.ctypes.data < stop for start, stop in _truncated)


@contextmanager
def sigbus_guard() -> Iterator[None]:
    """Handle SIGBUS in registered mappings; without effect on any system but 64-bit Linux."""
    global _depth
    if not _SUPPORTED:
        yield
        return
    with _lock:
        if _depth == 0:
            action = _SigAction(ctypes.cast(_handler, ctypes.c_void_p), flags=_SA_SIGINFO)
            _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_previous))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_previous), None)


def _on_sigbus(number: int, info: int, context: int) -> None:
    """Called on the thread that touched the page, between two of its instructions."""
    global _truncated
    address = ctypes.c_void_p.from_address(info + _SI_ADDR_OFFSET).value or 0
    for start, stop in _registered:
        if start <= address < stop:
            _truncated = (*_truncated, (start, stop))
            access = mmap.PROT_READ | mmap.PROT_WRITE
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            _libc.mmap(start, stop - start, access, kind, -1, 0)
            return
    # Not ours: the instruction is tried again, under the previous handler.
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_previous), None)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_sigbus)
