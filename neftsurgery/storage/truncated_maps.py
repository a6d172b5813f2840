"""A mapped file that somebody cuts short: an error of ours, where the system would end the process.

Touching mapped pages that the file no longer has raises SIGBUS. While `survived` lasts, such pages of
watched mappings become zeros instead, and `was_cut_short` says so; any other SIGBUS is what it was before.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["survived", "was_cut_short", "watch"]

_Range = tuple[int, int]
_FIXED = 0x10  # MAP_FIXED, which the mmap module does not name
_SA_SIGINFO = 4
_ADDRESS = 16  # of si_addr in a siginfo_t, where pointers have 8 bytes
_SUPPORTED = sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8

# Replaced, never changed: the handler reads them in the midst of anything.
_watched: tuple[_Range, ...] = ()
_cut: tuple[_Range, ...] = ()
_lock = threading.RLock()
_depth = 0


class _Action(ctypes.Structure):
    """The C library's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_before = _Action()
_libc: Any = ctypes.PyDLL(None)  # keeps the GIL: a handler is no place to wait for it
if _SUPPORTED:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )


def watch(pages: NDArray[np.uint8]) -> None:
    """Have a mapping survive, for as long as the array of all its pages lives."""
    global _watched
    here = (pages.ctypes.data, pages.ctypes.data + pages.nbytes)
    with _lock:
        _watched = (*_watched, here)
    weakref.finalize(pages, _forget, here).atexit = False


def _forget(here: _Range) -> None:
    global _watched, _cut
    with _lock:
        _watched = tuple(one for one in _watched if one != here)
        _cut = tuple(one for one in _cut if one != here)


def was_cut_short(part: NDArray[np.uint8]) -> bool:
    """Whether bytes of the mapping that ``part`` lies in were missing when they were touched."""
    return any(start <= part.ctypes.data < stop for start, stop in _cut)


@contextmanager
def survived() -> Iterator[None]:
    """Survive the loss of watched mappings; without effect where the system is another."""
    global _depth
    if not _SUPPORTED:
        yield
        return
    with _lock:
        if _depth == 0:
            action = _Action(ctypes.cast(_on_bus_error, ctypes.c_void_p), flags=_SA_SIGINFO)
            _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_before))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_before), None)


def _bus_error(number: int, info: int, context: int) -> None:
    """Called on the thread that touched the page, between two of its instructions."""
    global _cut
    address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
    for start, stop in _watched:
        if start <= address < stop:
            _cut = (*_cut, (start, stop))
            access = mmap.PROT_READ | mmap.PROT_WRITE
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
            _libc.mmap(start, stop - start, access, kind, -1, 0)
            return
    # Not ours: the instruction is tried again, and meets what was there before.
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_before), None)


_on_bus_error = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_bus_error)
