"""What a terminal shows while work is under way: one bar, with its figures in it and remarks above it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

CODE = """
from neftsurgery.cli.console import Console, lossy_streams
from neftsurgery.storage.threads import Limits
with lossy_streams():
    console = Console(as_json=False, quiet=False, limits=Limits.of())
    with console.progress("training", 3, unit="step") as advance:
        advance(1)
        console.report("step 1 of 3", "loss 0.5")
        console.note("a remark")
        advance(2)
    console.report("step 3 of 3", "loss 0.4")
"""


def test_remarks_go_through_the_bar_and_figures_into_it() -> None:
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    subprocess.run([sys.executable, "-c", CODE], stderr=inside, stdout=subprocess.PIPE, check=True)
    os.close(inside)
    shown = b""
    while b"loss 0.4" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]
    bars = [line for line in lines if line.startswith("training:")]
    assert [line for line in lines if line not in bars] == ["a remark", "step 3 of 3: loss 0.4"]
    assert any(re.search(r"1/3 \[.*step.*, loss 0\.5\]$", line) for line in bars)
    assert lines.index("a remark") < len(lines) - 1 - lines[::-1].index(bars[-1])  # the bar is drawn again
