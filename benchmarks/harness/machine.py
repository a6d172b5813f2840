"""A description of the machine: what a reader needs to judge the figures, and nothing that identifies it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("neftsurgery", "numpy", "numba", "safetensors", "torch", "transformers", "peft", "mergekit")


def describe(work: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Processor, memory, kernel, the file system under ``work``, load before the start, and versions."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024 / 1e9, 1),
        "kernel": " ".join([platform.system(), *re.findall(r"^[\d.]+", platform.release())]),
        "file_system": _file_system(work),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
    }


def _field(file: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*:\s*(.+)$", Path(file).read_text(), re.MULTILINE)
    return match and match[1].strip()


def _file_system(path: Path) -> str:
    """The type of the file system with the longest mount point above ``path``."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _version(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None
