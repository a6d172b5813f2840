"""The command line's guard against mapped files that are truncated: an error instead of a killed process.

Touching mapped pages that the file no longer has raises SIGBUS. Inside `sigbus_guard`, the pages of
registered mappings become zeros instead, and `is_truncated` reports it. Any other SIGBUS is handled as
before. The guard installs a signal handler, so only the command line uses it: see `Limits.mapped`.
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

__all__ = ["is_truncated", "register", "sigbus_guard"]

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
    _libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )


def register(pages: NDArray[np.uint8]) -> None:
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
