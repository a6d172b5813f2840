"""The run on a GPU, without its steps: what it says without a device, how steps end, and the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import suite
from benchmarks.gpu.options import RESULTS, Options, Step
from benchmarks.harness import results
from benchmarks.page.gpu import render_gpu

ROOT = Path(__file__).resolve().parents[2]
REPORT = """<testsuites><testsuite>
<testcase name="fine"/>
<testcase name="absent"><skipped message="no bitsandbytes"/></testcase>
<testcase name="wrong"><failure message="assert 1 == 2&#10;more"/></testcase>
</testsuite></testsuites>"""


def options(out: Path, device: str = "cuda") -> Options:
    return Options(device, "bf16", "llama-7b", 4, False, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device: torch" in done.stderr
    assert "make gpu DEVICE=cpu" in done.stderr
    assert not (tmp_path / "gpu").exists()


def test_all_steps_take_at_most_eight_minutes(tmp_path: Path) -> None:
    steps = options(tmp_path).steps()
    assert sum(step.limit for step in steps) <= 480
    line = " ".join(steps[1].command)
    assert "benchmarks training --device cuda --dtype bf16 --shape llama-7b --layers 4" in line
    assert "cuda" in steps[0].command


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("print('fine')", "done"),
        ("1 / 0", "failed, exit code 1"),
        ("import time; time.sleep(60)", "stopped after 1 s"),
    ],
)
def test_how_a_step_ends(code: str, ended: str, tmp_path: Path) -> None:
    step = Step("step", (sys.executable, "-c", code), 1 if "sleep" in code else 60)
    assert suite._run(step, options(tmp_path))["ended"] == ended


def test_the_page_names_tests_that_failed(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    out.mkdir()
    (out / "tests.xml").write_text(REPORT)
    tests = suite._tests(out / "tests.xml")
    assert tests == {
        "passed": 1, "skipped": {"absent": "no bitsandbytes"}, "failed": {"wrong": "assert 1 == 2"},
    }  # fmt: skip
    device = {"name": "NVIDIA H200", "memory_gb": 150.1, "cuda": "13.0", "capability": "9.0"}
    here = {"processor": "a processor", "cores": 16, "python": "3.11", "packages": {"torch": "2.13.0"}}
    part = {
        "command": "python -m benchmarks gpu", "quick": False, "date": "2026-11-30", "seconds": 200,
        "device": device, "machine": here, "tests": tests,
        "steps": [{"name": "tests", "seconds": 40, "ended": "failed, exit code 1", "output": []}],
    }  # fmt: skip
    results.store(out / RESULTS, "gpu", part)
    assert suite.failed(out)
    render_gpu(out)
    page = (tmp_path / "gpu.md").read_text()
    assert "on NVIDIA H200; 150.1 GB, capability 9.0, CUDA 13.0" in page
    assert "1 passed, 1 failed, 1 skipped." in page
    assert "- wrong: **assert 1 == 2**" in page
    assert "| tests | 40 | failed, exit code 1 |" in page
