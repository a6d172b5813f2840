"""What all verbs share: the keywords of a run, and warnings that a plan found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import keyword, spelled
from ..progress import Progress, silent
from ..storage.threads import Limits

__all__ = ["running", "warn"]


def running(options: Mapping[str, Any]) -> tuple[Limits, Progress]:
    """The limits and the listener that `RunOptions` name."""
    return Limits.of(options.get("threads"), options.get("memory")), options.get("progress") or silent


def warn(log: logging.Logger, warnings: Sequence[str]) -> None:
    """Log what a plan found, in the words of Python."""
    for warning in warnings:
        log.warning("%s", spelled(warning, keyword))
