"""Standard streams that are closed, full or left: the work is done, and its exit code is right."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from support import snapshot

WORDS = {
    "inspect": ("inspect", "base"),
    "diff": ("diff", "base", "tuned", "-o", "out"),
    "select": ("select", "s", "--neurons", "9", "-o", "out"),
    "extract": ("extract", "base", "tuned", "--neurons", "9%", "-o", "out"),
    "apply": ("apply", "base", "p", "-o", "out"),
    "verify": ("verify", "base", "p"),
    "revert": ("revert", "base", "p", "-o", "out"),
    "heal": ("heal", "base"),
    "merge": ("merge", "p", "-o", "out"),
    "export": ("export", "p", "--to", "lora", "-o", "out"),
    "report": ("report", "s", "-o", "out"),
    "push": ("push", "p", "me/it", "--dry-run"),
    "demo": ("demo", "--files-only", "--dry-run"),
    "help": ("--help",),
}
CLOSED = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-", "all": "<&- >&- 2>&-"}


@pytest.fixture
def inputs(neft, pair, tmp_path):
    assert neft("extract", "base", "tuned", "--neurons", "3%", "--reversible", "-o", "p").code == 0
    assert neft("diff", "base", "tuned", "-o", "s").code == 0
    return tmp_path


def shell(folder: Path, words: tuple[str, ...], streams: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line with its streams redirected by the shell, as users do."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {streams}', "sh", sys.executable, "-m", "neftsurgery", *words],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("closed", ["stdout", "all"])
@pytest.mark.parametrize("command", WORDS)
def test_closed_streams_are_as_the_null_device(inputs, command, closed):
    done = shell(inputs, WORDS[command], CLOSED[closed])
    assert (done.returncode, done.stdout) == (0, "")
    assert "internal error" not in done.stderr
    assert ("out" in WORDS[command]) == (inputs / "out").exists()


@pytest.mark.parametrize("closed", CLOSED)
def test_an_output_file_does_not_get_the_number_of_a_closed_stream(inputs, closed):
    """Otherwise what a library prints to descriptor 1 or 2 would be in the middle of the weights."""
    assert shell(inputs, WORDS["apply"], "").returncode == 0
    expected = snapshot(inputs / "out")
    script = (
        "import os, sys\n"
        "from neftsurgery.storage import copying\n"
        "kept = copying.copy_file\n"
        "def noisy(*words, **options):\n"
        "    for number in (1, 2):\n"
        "        try: os.write(number, b'noise')\n"
        "        except OSError: pass\n"
        "    return kept(*words, **options)\n"
        "from neftsurgery.surgery import rewrite\n"
        "rewrite.copy_file = noisy\n"
        "from neftsurgery.cli.main import run\n"
        "run(['apply', 'base', 'p', '-o', 'again'])\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$@" {CLOSED[closed]}', "sh", sys.executable, "-c", script],
        cwd=inputs,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    assert snapshot(inputs / "again") == expected


def test_errors_keep_their_code_without_streams(inputs):
    for streams in (*CLOSED.values(), "2>/dev/full", ">/dev/full"):
        assert shell(inputs, ("inspect", "nothing"), streams).returncode == 2
        assert shell(inputs, ("diff", "base"), streams).returncode == 2
        assert shell(inputs, ("verify", "tuned", "p", "--expect", "base"), streams).returncode == 3


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["words", "json"])
@pytest.mark.parametrize("command", ["inspect", "extract", "verify", "help"])
def test_lost_output_is_an_error_with_its_reason_and_the_work_is_done(inputs, command, more):
    words = (*WORDS[command], *more) if command != "help" else WORDS[command]
    done = shell(inputs, words, ">/dev/full")
    assert done.returncode == 5
    first, hint = done.stderr.splitlines()
    assert first == "neftsurgery: standard output: no space left on device: what was printed is lost"
    assert hint == "the command itself has succeeded"
    assert ("out" in words) == (inputs / "out").exists()
    assert "bad file descriptor" in shell(inputs, (*words, *(["--force"] * ("out" in words))), "1<p").stderr


@pytest.mark.parametrize("command", ["inspect", "diff", "extract", "push", "help"])
def test_a_reader_that_leaves_does_not_stop_the_work(inputs, command):
    reader, writer = os.pipe()
    os.close(reader)  # before the first byte, so that every write fails
    done = subprocess.run(
        [sys.executable, "-m", "neftsurgery", *WORDS[command]],
        cwd=inputs,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0
    assert "neftsurgery:" not in done.stderr
    assert "Broken" not in done.stderr
    assert ("out" in WORDS[command]) == (inputs / "out").exists()


def test_a_pipe_that_does_not_block_loses_nothing(inputs):
    """Some parents (node, ssh) share pipes that do not block; a slow reader then makes writes fail."""
    expected = shell(inputs, ("inspect", "base", "--all", "--json"), "").stdout
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = os.write(writer, bytes(1 << 20))
    child = subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", "inspect", "base", "--all", "--json"], cwd=inputs, stdout=writer
    )
    os.close(writer)
    with suppress(subprocess.TimeoutExpired):
        child.wait(3)  # by then it has tried to write
    with open(reader, "rb") as file:
        found = file.read()[filled:].decode()
    assert child.wait(300) == 0
    assert json.loads(found) == json.loads(expected)


def test_a_terminal_that_goes_away_does_not_stop_the_work(inputs):
    """Progress bars are drawn on it until it hangs up; no signal comes, as it controls no process."""
    (inputs / "base" / "pytorch_model.bin").write_bytes(b"")  # of which a line on stderr tells at the end
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    child = subprocess.Popen(
        [sys.executable, "-m", "neftsurgery", *WORDS["apply"]],
        cwd=inputs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    assert os.read(master, 1)  # the first bar
    os.close(master)
    assert child.wait(300) == 0
    assert (inputs / "out").exists()


def test_streams_that_python_does_not_have(inputs):
    script = "import sys\nfrom neftsurgery.cli.main import run\nsys.stdout = sys.stderr = sys.stdin = None\n"
    for words in (["inspect", "base", "--json"], ["heal", "base"], ["verify", "base", "p"]):
        done = subprocess.run(
            [sys.executable, "-c", f"{script}run({words})"], cwd=inputs, capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_names_that_the_encoding_lacks_are_escaped(inputs):
    (inputs / "base").rename(inputs / "Basis-神")
    done = subprocess.run(
        [sys.executable, "-m", "neftsurgery", "inspect", "Basis-神"],
        cwd=inputs,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"Basis-\u795e" in done.stdout
