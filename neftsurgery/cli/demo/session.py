"""What the demos share: their commands, and the session that shows and runs them and makes checks."""

from __future__ import annotations

import hashlib
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

from ...demo.planted import PLANTED
from ..console import Console

SHARE = "9%"
_DIFF = "diff base tuned -o scores.safetensors"
_APPLY_VERIFY_REVERT = (
    "apply base neuron_patch.safetensors -o patched",
    "verify patched neuron_patch.safetensors --expect patched",
    "revert patched neuron_patch.safetensors --base base -o restored",
)
FILES_LINES = (
    _DIFF,
    f"extract base tuned --neurons {PLANTED} -o neuron_patch.safetensors",
    *_APPLY_VERIFY_REVERT,
    f"report scores.safetensors --neurons {PLANTED} -o report.html",
)
TRAINING_LINES = (
    _DIFF,
    f"select scores.safetensors --neurons {SHARE} -o selection.safetensors",
    f"select scores.safetensors --neurons {SHARE} --policy random -o control.safetensors",
    *_APPLY_VERIFY_REVERT,
    f"report scores.safetensors control_patch.safetensors --neurons {SHARE} -o report.html",
)


class DemoSession:
    """The console that shows a demo, and the folder that its commands run in."""

    def __init__(self, console: Console, folder: Path) -> None:
        self.console = console
        self.folder = folder

    def heading(self, text: str) -> None:
        """Begin a part of the demo."""
        self.console.say("", f"== {text}")

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

    def check_restored(self) -> bool:
        """Check that reverting the patch restored the base, and that the patch had changed it."""
        base, patched, restored = (_digests(self.folder / name) for name in ("base", "patched", "restored"))
        same = base == restored != patched
        return self.check("every file in restored/ equals the one in base/, bit for bit", same)

    def draw_report(self, line: str) -> None:
        """Run the command of the report, if its packages are installed."""
        if can_draw():
            self.heading("Draw a report")
            self.run_command(line)


def can_draw() -> bool:
    """Whether the packages that a report needs are installed."""
    return all(find_spec(name) is not None for name in ("jinja2", "matplotlib"))


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
