"""Runs the steps, each a process with a time limit, and stores what came of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.options import RESULTS, Options, Step
from benchmarks.harness import machine, results
from benchmarks.harness.log import log
from benchmarks.harness.process import QUIET

NEEDS = ("torch", "transformers", "peft", "pytest", "hypothesis")
ASK = """
import json, torch
cuda = torch.version.cuda
if torch.cuda.is_available():
    one = torch.cuda.get_device_properties(0)
    found = {"name": one.name, "memory_gb": round(one.total_memory / 1e9, 1), "cuda": cuda}
    found["capability"] = f"{one.major}.{one.minor}"
elif cuda is None:
    found = {"missing": f"torch {torch.__version__} was built without CUDA"}
else:
    found = {"missing": f"torch {torch.__version__} was built for CUDA {cuda}, and finds no device"}
print(json.dumps(found))
"""


def measure(options: Options) -> None:
    """Runs all steps; writes ``options.out/gpu.json``."""
    began = time.perf_counter()
    device = _device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    for stale in ("training.json", "switch.json", "tests.xml", RESULTS):
        (options.out / stale).unlink(missing_ok=True)
    done = [_run(step, options) for step in options.steps()]
    part = {
        "command": options.command(),
        "quick": options.quick,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - began),
        "device": device,
        "machine": machine.describe(options.out),
        "steps": done,
        "tests": _tests(options.out / "tests.xml"),
    }
    results.store(options.out / RESULTS, "gpu", part)


def failed(out: Path) -> bool:
    """Whether a step of the run failed."""
    return any(step["ended"] != "done" for step in results.load(out / RESULTS)["gpu"]["steps"])


def _device(device: str) -> dict[str, Any]:
    """What torch says of the device. Exits, with what is missing, if nothing can be run."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; pip install '.[test]' beside a torch with CUDA")
    if device == "cpu":
        return {"name": "the processor, in the place of a GPU"}
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    found = dict(json.loads(asked.stdout.splitlines()[-1]))
    if "missing" in found:
        sys.exit(
            f"no CUDA device: {found['missing']}\n"
            "`make gpu DEVICE=cpu` tries every step on the processor, with a tiny model"
        )
    return found


def _run(step: Step, options: Options) -> dict[str, Any]:
    """Runs one step and tells how it ended. One that takes too long is stopped, with its processes."""
    log(f"{step.name}: {' '.join(step.command[1:])}")
    environment = os.environ | QUIET
    if options.device == "cpu":
        environment["NEFT_CUDA_DEVICE"] = "cpu"
    began = time.perf_counter()
    with subprocess.Popen(
        step.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        limit = None if options.device == "cpu" else step.limit
        try:
            output, _ = process.communicate(timeout=limit)
            ended = "done" if process.returncode == 0 else f"failed, exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            ended = f"stopped after {step.limit} s"
    seconds = round(time.perf_counter() - began)
    log(f"{step.name}: {ended}, {seconds} s")
    if ended != "done":
        log(output)
    return {"name": step.name, "seconds": seconds, "ended": ended, "output": output.splitlines()[-30:]}


def _tests(report: Path) -> dict[str, Any]:
    """How many tests passed, and which did not, from pytest's report."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped, bad = {}, {}
    for case in cases:
        for kind, found in (("skipped", skipped), ("failure", bad), ("error", bad)):
            if (told := case.find(kind)) is not None:
                found[case.get("name", "")] = str(told.get("message", "")).splitlines()[0][:200]
    return {"passed": len(cases) - len(skipped) - len(bad), "skipped": skipped, "failed": bad}
