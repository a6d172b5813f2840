"""Reads a patch's rows by the documented format alone, and syncs what a rival wrote."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

Rows = tuple[torch.Tensor, torch.Tensor]  # indices, new values


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
