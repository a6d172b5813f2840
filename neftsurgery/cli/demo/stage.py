"""Where a round is shown: titles, commands as they are typed and done, claims that hold or do not."""

from __future__ import annotations

import hashlib
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from ..console import Console

__all__ = ["Stage", "can_draw", "digests", "yes"]


class Stage:
    """A console and a folder to work in.

    Attributes
    ----------
    console:
        Where it is shown.
    place:
        The folder.
    """

    def __init__(self, console: Console, place: Path) -> None:
        self.console = console
        self.place = place

    def title(self, text: str) -> None:
        """What comes next."""
        self.console.say(f"\n== {text}")

    def type(self, line: str) -> None:
        """Show a command, and do what it does."""
        from ..main import cli

        self.console.say(f"$ neftsurgery {line}")
        words = shlex.split(line)
        if self.console.quiet or self.console.as_json:
            words.append("--quiet")
        before = Path.cwd()
        os.chdir(self.place)
        try:
            cli.main(words, prog_name="neftsurgery", standalone_mode=False)
        finally:
            os.chdir(before)

    def claim(self, text: str, held: bool) -> bool:
        """Say whether it held; returns that."""
        self.console.say(f"  -> {text}: {yes(held)}")
        return held


def can_draw() -> bool:
    """Whether what a report needs is installed."""
    return all(find_spec(name) is not None for name in ("jinja2", "matplotlib"))


def digests(folder: Path) -> dict[str, str]:
    """The files of a folder by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def yes(held: bool) -> str:
    """For people."""
    return "yes" if held else "NO"
