"""A patch's rows, read by the documented format alone; and the end of every rival that writes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

Rows = tuple[torch.Tensor, torch.Tensor]  # which, and what they become


def rows_of(patch: str) -> dict[str, Rows]:
    """Per touched tensor, the indices and values of its rows."""
    entries = load_file(patch)
    names = [key.removesuffix(":index") for key in entries if key.endswith(":index")]
    return {name: (entries[f"{name}:index"].long(), entries[f"{name}:value"]) for name in names}


def sync(folder: str) -> None:
    """Every file of ``folder`` reaches the disk."""
    for file in Path(folder).iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
