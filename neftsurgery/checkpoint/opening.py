"""The way commands open a checkpoint: find it, refuse it if a change in place was cut short, read headers."""

from __future__ import annotations

import os

from ..errors import boundary
from ..sources.resolve import Source, resolve
from .checkpoint import Checkpoint
from .unfinished import refuse_unfinished

__all__ = ["open_checkpoint"]


@boundary
def open_checkpoint(named: str | os.PathLike[str] | Source) -> Checkpoint:
    """Open the checkpoint at a path or of a Hub id.

    Raises
    ------
    UsageError
        If there is no such checkpoint.
    CorruptFileError
        If a header or the index is damaged, or points outside its folder.
    MachineError
        If something cannot be read, or a change in place was cut short: see `neftsurgery.heal`.
    """
    source = named if isinstance(named, Source) else resolve(named)
    refuse_unfinished(source)
    return Checkpoint.read(source)
