"""What the rivals share: their command line, rows of a patch by the documented format alone, and syncing."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from safetensors import safe_open

if TYPE_CHECKING:  # loops of numpy do not import it
    import torch

    Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # indices, new values


def timed(work: Callable[..., dict[str, int] | None]) -> None:
    """Calls ``work`` with the words of the command line; prints its seconds and the facts it returns."""
    began = time.perf_counter()
    facts = work(*sys.argv[1:]) or {}
    print(json.dumps({"seconds": time.perf_counter() - began, **facts}))


def rows_of(patch: str) -> dict[str, Rows]:
    """The indices and values of the rows of each touched tensor."""
    from safetensors.torch import load_file

    entries, used = load_file(patch), Counter[str]()
    found: dict[str, Rows] = {}
    with safe_open(patch, "pt") as file:
        tensors = json.loads(file.metadata()["neuron_patch"])["tensors"]
    for name, entry in sorted(tensors.items()):
        value, rows, width = f"value:{entry['dtype']}", entry["rows"], math.prod(entry["shape"][1:])
        index = entries["index"].narrow(0, used["index"], rows).long()
        found[name] = index, entries[value].narrow(0, used[value], rows * width).view(rows, width)
        used.update({"index": rows, value: rows * width})
    return found


def sync(folder: str) -> None:
    """Flushes every file of ``folder`` to the disk."""
    for file in Path(folder).iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
