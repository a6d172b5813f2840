"""What the rivals share: their command line, rows of a patch by the documented format alone, and syncing."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

Rows = tuple[torch.Tensor, torch.Tensor]  # indices, new values


def timed(work: Callable[..., dict[str, int] | None]) -> None:
    """Calls ``work`` with the words of the command line; prints its seconds and the facts it returns."""
    began = time.perf_counter()
    facts = work(*sys.argv[1:]) or {}
    print(json.dumps({"seconds": time.perf_counter() - began, **facts}))


def rows_of(patch: str) -> dict[str, Rows]:
    """The indices and values of the rows of each touched tensor."""
    entries = load_file(patch)
    names = [key.removesuffix(":index") for key in entries if key.endswith(":index")]
    return {name: (entries[f"{name}:index"].long(), entries[f"{name}:value"]) for name in names}


def sync(folder: str) -> None:
    """Flushes every file of ``folder`` to the disk."""
    for file in Path(folder).iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
