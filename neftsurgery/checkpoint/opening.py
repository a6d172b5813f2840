"""The way every command opens a checkpoint: find it, heal it, read its headers."""

from __future__ import annotations

import logging
import os

from ..errors import boundary
from ..sources.resolve import Source, resolve
from .checkpoint import Checkpoint
from .journal import heal

__all__ = ["open_checkpoint"]

log = logging.getLogger(__name__)


@boundary
def open_checkpoint(named: str | os.PathLike[str] | Source) -> Checkpoint:
    """Open the checkpoint at a path or of a Hub id; a change in place that was cut short is undone first.

    Raises
    ------
    UsageError
        If there is no such checkpoint.
    CorruptFileError
        If a header, the index or a journal is damaged, or points outside its folder.
    MismatchError
        If a journal lies there that belongs to other files.
    MachineError
        If something cannot be read, or the checkpoint needs healing and cannot be written.
    """
    source = named if isinstance(named, Source) else resolve(named)
    if heal(source):
        log.warning("%s: a change in place was cut short; it is undone", source.named)
    return Checkpoint.read(source)
