"""Resident memory of this process: now, and its peak."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path


def resident() -> int:
    """Resident bytes now."""
    return _field("VmRSS")


def peak() -> int:
    """Peak resident bytes since the start, or since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Starts a new peak. Freed memory goes back to the system first, where the C library can do that."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class PeakMemory:
    """Peak bytes since its creation, above those in use then: of the process, or of the GPU's allocations."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            reset_peak()
            self._before = resident()

    def peak(self) -> int:
        """Bytes."""
        if not self._cuda:
            return peak() - self._before
        import torch

        return int(torch.cuda.max_memory_allocated()) - self._before


def _field(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


_libc = ctypes.CDLL(None)
