"""What a terminal shows: one bar with its figures in it and remarks above it, and tables that fit."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

CODE = """
import time
from neftsurgery.cli.console import Console, lossy_streams
from neftsurgery.storage.threads import Limits
with lossy_streams():
    console = Console(as_json=False, quiet=False, limits=Limits.of())
    with console.progress("training", 3, unit="step") as advance:
        advance(1)
        console.report("step 1 of 3", "loss 0.5")
        time.sleep(0.3)  # a bar is drawn ten times a second
        console.note("a remark")
        advance(2)
    console.report("step 3 of 3", "loss 0.4")
"""


TABLE = """
from neftsurgery.cli.console import Console, lossy_streams, remark
from neftsurgery.storage.threads import Limits
with lossy_streams():
    console = Console(as_json=False, quiet=False, limits=Limits.of())
    name = "model.layers.0.mlp.experts.down_proj.weight" * 2
    rows = [[name, "12", "3.1%"], ["lm_head", "4,096", "100%"], ["[red]", "7", "1%"]]
    console.say_table(rows, right=[1, 2])
    remark("neftsurgery: no such file")
    console.note("warning: few")
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(code: str, columns: int = 80, **environment: str) -> str:
    """What a terminal of this width gets; its stdout and stderr are one."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    plain = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; print('the end', file=sys.stderr)"],
        stdout=inside, stderr=inside, check=True, env=plain | {"TERM": "xterm"} | environment,
    )  # fmt: skip
    os.close(inside)
    shown = b""
    while b"the end" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    return shown.decode()


def test_remarks_go_through_the_bar_and_figures_into_it() -> None:
    shown = _ESCAPES.sub("", on_terminal(CODE))
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    bars = [line for line in lines if line.startswith("training")]
    assert [line for line in lines if line not in bars] == ["a remark", "step 3 of 3: loss 0.4", "the end"]
    assert any(re.search(r"1/3 steps .*loss 0\.5$", line) for line in bars)
    assert lines.index("a remark") < len(lines) - 1 - lines[::-1].index(bars[-1])  # the bar is drawn again


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_fits_the_terminal(columns: int) -> None:
    shown = on_terminal(TABLE, columns)
    lines = _ESCAPES.sub("", shown).splitlines()
    assert max(map(len, lines)) <= columns
    assert "".join(line[2:50].strip() for line in lines[:2]).startswith(
        "model.layers.0.mlp.experts.down_proj"
    )
    assert [line.split() for line in lines[-5:-3]] == [["lm_head", "4,096", "100%"], ["[red]", "7", "1%"]]
    assert lines[-3:] == ["neftsurgery: no such file", "warning: few", "the end"]
    assert "\x1b[36m" in shown
    assert "\x1b[1;31mneftsurgery\x1b[0m" in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colour_gets_none(environment: dict[str, str]) -> None:
    shown = on_terminal(TABLE, **environment)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)


def test_a_pipe_gets_whole_lines() -> None:
    done = subprocess.run([sys.executable, "-c", TABLE], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[1] == f"  {'lm_head':86}  4,096  100%"
    assert done.stderr.splitlines() == ["neftsurgery: no such file", "warning: few"]
