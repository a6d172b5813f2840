"""Runs one command in its own process and measures what it costs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

# A child must not use the network, and must not write progress bars between our progress lines.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
UNCOMPILED = "PYTHONDONTWRITEBYTECODE"  # installed packages are compiled, and so is what is measured


@dataclass(frozen=True)
class Run:
    """What one process cost.

    ``wall`` and ``cpu`` are seconds from before the process starts to after it ends. ``peak`` is the peak
    resident memory in bytes, mapped file pages included. ``handed`` counts the bytes passed to write calls,
    ``dirtied`` those of the pages that became dirty. ``seconds`` is the time that the command itself reports
    for its work, without its start (None if it reports none). ``printed`` is the JSON object it printed.
    """

    wall: float
    cpu: float
    peak: int
    handed: int
    dirtied: int
    seconds: float | None
    printed: dict[str, Any] = field(default_factory=dict)


class CommandError(Exception):
    """A measured command did not exit with 0."""

    def __init__(self, command: Sequence[str], code: int, error: str) -> None:
        self.code, self.error = code, error.strip()
        super().__init__(f"exit code {code} from {' '.join(command)}\n{self.error}")

    @property
    def reason(self) -> str:
        """The last line it wrote to stderr. Paths are shortened to their last part."""
        line = self.error.splitlines()[-1] if self.error else f"exit code {self.code}"
        return re.sub(r"(?<!\S)/(\S+/)+", "", line)


def run(command: Sequence[str]) -> Run:
    """Runs ``command`` and waits for it.

    Peak memory is what the system reports. It includes the peak of this process, which Linux counts as the
    child's until the child executes its program: 25 MB as long as nothing large is imported here.

    Raises:
        CommandError: The command did not exit with 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        began = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            list(command),
            {key: value for key, value in os.environ.items() if key != UNCOMPILED} | QUIET,
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, error.fileno(), 2)],
        )
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - began
        written = _written(pid)  # ended but not yet reaped: its counters are still there, and final
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            raise CommandError(command, code, _text(error))
        printed = _last_object(_text(out))
    return Run(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss * 1024,
        handed=written.get("wchar", 0),
        dirtied=written.get("write_bytes", 0),
        seconds=printed.get("seconds"),
        printed=printed,
    )


def _written(pid: int) -> dict[str, int]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return {}


def _text(file: BinaryIO | tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object on the last line, if there is one. Libraries may have printed lines before it."""
    lines = text.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(lines[-1]))
    return {}
