"""Sizes in bytes, parsed and formatted: ``2.4GB``."""

from __future__ import annotations

import re

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``2.4GB``, ``300 MB``, ``512KiB``, ``4096``. Raises ValueError for anything else."""
    match = re.fullmatch(r"([\d.]+)\s*(|k|K|M|G|T|Ki|Mi|Gi)B?", text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size: write it like 2.4GB or 512KiB")
    unit = "k" if match[2] == "K" else match[2]
    return round(float(match[1]) * UNITS[unit])


def format_size(nbytes: float) -> str:
    """``2.4 GB`` for 2,400,000,000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"
