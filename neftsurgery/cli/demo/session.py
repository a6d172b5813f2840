"""The session that a demo runs in: headings, commands that are shown and run, and checks."""

from __future__ import annotations

import hashlib
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from ..console import Console

__all__ = ["DemoSession", "can_draw", "digests"]


class DemoSession:
    """A console and a working folder.

    Attributes
    ----------
    console:
        The console that shows the demo.
    folder:
        The folder that the commands run in.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self.console = console
        self.folder = folder

    def heading(self, text: str) -> None:
        """Begin a part of the demo."""
        self.console.say(f"\n== {text}")

    def run_command(self, line: str) -> None:
        """Show a command and run it."""
        from ..main import cli

        self.console.say(f"$ neftsurgery {line}")
        words = shlex.split(line)
        if self.console.quiet or self.console.as_json:
            words.append("--quiet")
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            cli.main(words, prog_name="neftsurgery", standalone_mode=False)
        finally:
            os.chdir(before)

    def check(self, text: str, passed: bool) -> bool:
        """Show whether a check passed; returns ``passed``."""
        self.console.say(f"  -> {text}: {'yes' if passed else 'NO'}")
        return passed


def can_draw() -> bool:
    """Whether the packages that a report needs are installed."""
    return all(find_spec(name) is not None for name in ("jinja2", "matplotlib"))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
