"""A results file of JSON lines, one for each finished run: a killed process loses one run only."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load(file: Path) -> list[dict[str, Any]]:
    """The complete lines, in order. A truncated last line is ignored."""
    return list(_lines(file.read_bytes())) if file.exists() else []


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds a line and syncs it. It replaces a truncated last line. Several processes may append."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    with open(fd, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        whole = stream.read()
        stream.seek(whole.rfind(b"\n") + 1)
        stream.truncate()
        stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        yield dict(json.loads(line))
